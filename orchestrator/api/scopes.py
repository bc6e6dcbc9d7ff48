"""Which call needs which scope. This table is the only place that says so; a test walks all routes."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.api.asgi import Scope as Request
from orchestrator.api.asgi import query_value
from orchestrator.api.gateway import LLAMA_PATHS
from orchestrator.core.keys import Scope

OPEN = None
ANY = "*"
RELOAD = "/models?reload"
"""`GET /models` that reads the catalogue again is a call of its own here."""

Row = tuple[str, str, Scope | None]

ROWS: tuple[Row, ...] = (
    # What uses models, and what its clients ask to know which there are. A path that ends in /** means
    # all below it. A WebSocket is a GET.
    (ANY, "/v1/**", Scope.INFERENCE),
    (ANY, "/upstream/**", Scope.INFERENCE),
    *((ANY, path, Scope.INFERENCE) for path in sorted(LLAMA_PATHS)),
    (ANY, "/slots/**", Scope.INFERENCE),
    ("GET", "/models", Scope.INFERENCE),
    ("GET", "/models/**", Scope.INFERENCE),
    # What lends memory.
    (ANY, "/leases", Scope.LEASE),
    (ANY, "/leases/**", Scope.LEASE),
    ("POST", "/plan", Scope.LEASE),
    # What changes things for everybody. A request that names a model loads it by itself.
    ("POST", "/models/load", Scope.ADMIN),
    ("POST", "/models/unload", Scope.ADMIN),
    ("POST", "/models", Scope.ADMIN),
    ("DELETE", "/models", Scope.ADMIN),
    ("GET", RELOAD, Scope.ADMIN),
    (ANY, "/keys", Scope.ADMIN),
    (ANY, "/keys/**", Scope.ADMIN),
    # What shows the house: names of programs, logs in which questions may stand, ids of leases.
    ("GET", "/state", Scope.ADMIN),
    ("GET", "/events", Scope.ADMIN),
    ("GET", "/devices", Scope.ADMIN),
    ("GET", "/operations/**", Scope.ADMIN),
    ("GET", "/log", Scope.ADMIN),
    ("GET", "/logs/**", Scope.ADMIN),
    ("GET", "/doctor", Scope.ADMIN),
    (ANY, "/learned", Scope.ADMIN),
    (ANY, "/learned/**", Scope.ADMIN),
    (ANY, "/dashboard", Scope.ADMIN),
    (ANY, "/dashboard/**", Scope.ADMIN),
    # What anybody may see.
    *((ANY, path, OPEN) for path in ("/health", "/healthz", "/readyz")),
    *((ANY, path, OPEN) for path in ("/openapi.json", "/docs", "/docs/**", "/redoc")),
    *((ANY, path, OPEN) for path in ("/login", "/logout")),
)

EXACT = {(method, path): scope for method, path, scope in ROWS if not path.endswith("/**")}
BELOW = tuple((method, path[:-2], scope) for method, path, scope in ROWS if path.endswith("/**"))


def scopes_of(method: str, path: str) -> Iterable[Scope | None]:
    """What the call needs by the row that fits best; nothing where no row fits."""
    for key in ((method, path), (ANY, path)):
        if key in EXACT:
            return (EXACT[key],)
    fitting = (s for m, start, s in BELOW if path.startswith(start) and m in (ANY, method))
    return tuple(fitting)[:1]


def needed_scope(request: Request) -> Scope | None:
    """None if anybody may. What no row names needs the scope admin."""
    path: str = request["path"]
    if path.startswith("/v1/"):  # by far the most calls
        return Scope.INFERENCE
    method = "GET" if request["type"] == "websocket" or request["method"] == "HEAD" else request["method"]
    if path == "/models" and method == "GET" and query_value(request, "reload") is not None:
        path = RELOAD
    return next(iter(scopes_of(method, path)), Scope.ADMIN)
