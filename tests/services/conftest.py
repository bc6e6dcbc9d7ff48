"""The programs of services/llama-cpp/image are tested where they lie: they are scripts, not a package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "services" / "llama-cpp" / "image"))
