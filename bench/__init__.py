"""How fast the product is, each time against a bare baseline in the same run. Nothing here is a test."""
