"""Alembic's entry: run migrations on the connection that orchestrator.store.database hands over.

There is no alembic.ini and no offline mode: the server migrates its own database when it opens it.
"""

from alembic import context

from orchestrator.store.tables import METADATA

# Alembic takes SQLite for unable to roll back DDL, because Python's sqlite3 used to commit before it.
# Our connections open every transaction themselves, so a migration that fails leaves no trace.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
    transaction_per_migration=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
