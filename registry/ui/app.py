"""The application: from a request to an answer.

Whoever asks is checked first. Then an address is looked up in `_PAGES`, its function asks the registry, and the answer is
drawn in the form that was asked for. An answer is kept until the registry changes.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode

from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge
from werkzeug.exceptions import NotFound as NoSuchPage
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from registry.checkpoints import measured
from registry.reports import charts
from registry.store.errors import Conflict, Corrupt, Invalid, NotFound, RegistryError, Unsupported
from registry.store.text import printable
from registry.ui import diffs, drawing, finding, graph, models, runs, storage, version, zooming
from registry.ui.access import HEADERS, Access
from registry.ui.asking import Asking
from registry.ui.changes import change
from registry.ui.page import BASE, Args, Moved, Page, address
from registry.ui.reader import Reader, State
from registry.ui.watching import Watch

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_PAGES: Mapping[str, Callable[..., Page | Moved]] = {
    "/": models.models,
    "/m/<model>": models.versions,
    "/m/<model>@<alias>": version.by_alias,
    "/m/<model>/<name>": version.version,
    "/c/<reference>": version.by_reference,
    "/runs": runs.runs,
    "/r/latest": runs.latest_run,
    "/r/<model>/<name>": runs.run,
    "/compare": runs.compare,
    "/lineage": graph.lineage,
    "/storage": storage.storage,
    "/data": storage.data,
    "/data/<key>": storage.artifact,
    "/find": finding.find,
    "/api/v1/models": models.models,
    "/api/v1/models/<model>": models.versions,
    "/api/v1/versions/<model>/<name>": version.version,
    "/api/v1/runs": runs.runs,
    "/api/v1/runs/<model>/<name>": runs.run,
    "/api/v1/lineage": graph.lineage,
    "/api/v1/storage": storage.storage,
    "/api/v1/data": storage.data,
    "/api/v1/search": finding.find,
}
"""The pages that the registry alone answers, by address."""

_DIFFS = ("/diff", "/api/v1/diff")

_STATISTICS = "/api/v1/tensors/<digest>/stats"

_API = "/api/"

_STATIC = {"ui.css": "text/css", "ui.js": "text/javascript", "icon.svg": "image/svg+xml"}

_FORMS = {"html": "text/html", "json": "application/json", "csv": "text/csv"}

_logger = logging.getLogger(__name__)

_KEPT = 256
"""Answers that are kept."""

_MOST_BYTES = 32 << 20
"""Bytes of answers that are kept."""

_SMALL = 1_000
"""Bytes below which an answer is not compressed."""

_STATUS: Mapping[type[RegistryError], int] = {
    NotFound: 404,
    Invalid: 400,
    Unsupported: 400,
    Conflict: 409,
    Corrupt: 500,
}


class Body(NamedTuple):
    """What is sent.

    Attributes:
        tag: tells it from other ones under the same address.
        status: that of HTTP.
    """

    data: bytes
    packed: bytes
    form: str
    tag: str
    status: int = 200

    @property
    def size(self) -> int:
        """Bytes that it takes while it is kept."""
        return len(self.data) + len(self.packed)


_Key = tuple[str, tuple[tuple[str, str], ...], str]
"""A path, the arguments, and the form."""


class _Kept(NamedTuple):
    """An answer that is kept.

    Attributes:
        began: when the registry began to be asked for it, by the monotonic clock.
    """

    body: Body
    state: State
    began: float


class Application:
    """Answers requests about a registry.

    Args:
        access: who may ask.
        base: what all addresses begin with, as behind a proxy, such as `/proxy/6007`.
        is_api_only: whether only programs are answered.
        allows_changes: whether aliases, tags and notes may be added.
    """

    def __init__(
        self,
        reader: Reader,
        access: Access,
        *,
        base: str = "",
        is_api_only: bool = False,
        allows_changes: bool = False,
    ) -> None:
        self._reader = reader
        self._access = access
        self._base = base.rstrip("/")
        self._is_api_only = is_api_only
        self._allows_changes = allows_changes
        self._asking = Asking(reader.registry.place)
        # A tab that was open before the server began anew must not take the old answers for its own.
        self._begun = secrets.token_hex(4)
        self._watch = Watch(reader, self._begun)
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._turns: dict[_Key, threading.Lock] = {}
        self._lock = threading.Lock()
        rules = [
            Rule(path, endpoint=path)
            for path in (*_PAGES, *_DIFFS, _STATISTICS, "/events", "/change", "/static/<name>")
        ]
        self._map = Map(rules, strict_slashes=False, merge_slashes=False)
        self._is_closed = False

    def close(self) -> None:
        """End the streams and the worker."""
        self._is_closed = True
        self._watch.close()
        self._asking.close()
        self._reader.close()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        BASE.set(self._base)
        try:
            response = self._answer(request)
        except RequestEntityTooLarge:
            response = _plain("the text is too long; a form takes 64 kB", 413)
        except MethodNotAllowed:
            response = _plain("only GET and HEAD are answered here", 405)
        except HTTPException as error:
            response = self._failed(request, NotFound(f"there is no page {request.path}"), error.code or 404)
        except RegistryError as error:
            response = self._failed(request, error, _status_of(error))
        except Exception:
            if self._is_closed:
                return _plain("the server has ended", 503)(environ, start_response)
            _logger.exception("%s could not be drawn", printable(request.path))
            response = _plain("this page could not be drawn; the terminal of registry ui shows why", 500)
        response.headers.update(HEADERS)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        if not self._access.is_host(request.environ.get("HTTP_HOST", "")):
            return _plain("this name does not lead here; allow it with: registry ui --allowed-host NAME", 403)
        path = request.path
        if self._base and (path == self._base or path.startswith(f"{self._base}/")):
            path = path.removeprefix(self._base) or "/"
        if path.startswith("/static/"):
            return _static(path.removeprefix("/static/"))
        token = request.args.get("token")
        if token is not None and self._access.token:
            return self._log_in(request, path, token)
        shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not (self._access.is_known(request.cookies) or self._access.login(shown)):
            text = "this page needs a token: open the address that registry ui printed, as it holds one"
            return _plain(text, 403)
        if path == "/change":
            return self._change(request)
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])
        if path == "/events":
            return self._events()
        return self._page(request, path)

    def _log_in(self, request: Request, path: str, token: str) -> Response:
        login = self._access.login(token)
        if login is None:
            return _plain("the token is wrong; open the address that registry ui printed", 403)
        rest = [(name, value) for name, value in request.args.items(multi=True) if name != "token"]
        response = _moved(f"{self._base}{quote(path)}{'?' + urlencode(rest) if rest else ''}")
        # Strict would ask for the token again behind every link from elsewhere, as from a notebook.
        response.set_cookie(login.cookie, login.value, httponly=True, samesite="Lax", path="/")
        return response

    def _change(self, request: Request) -> Response:
        """Add an alias, a tag or a note."""
        if not self._allows_changes:
            return _plain("these pages are read-only; start them with: registry ui --allow-changes", 403)
        if request.method != "POST":
            raise MethodNotAllowed(["POST"])
        origin = request.headers.get("Origin", "").partition("://")[2]
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        if origin != request.environ.get("HTTP_HOST") or site != "same-origin":
            return _plain("this form was sent from another page", 403)
        request.max_content_length = 64 << 10
        form = request.form.to_dict()
        if not secrets.compare_digest(form.get("form_token", "").encode(), self._access.form_token.encode()):
            return _plain("this form is out of date; load the page again", 403)
        moved = self._reader.ask(lambda registry: change(registry, form))
        return _moved(moved.to, 303)

    def _events(self) -> Response:
        if self._watch.is_full:
            return _plain("too many pages listen", 503)
        return Response(
            self._watch.stream(self._reader.state()),
            mimetype="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    def _page(self, request: Request, path: str) -> Response:
        # A name that is given several times stands for a list.
        args = {name: " ".join(request.args.getlist(name)) for name in request.args}
        form = args.get("format", "json" if path.startswith(_API) else "html")
        if form not in _FORMS:
            raise Invalid("format is neither html nor json nor csv")
        if path.startswith("/api/v1/tensors/"):
            return self._statistics(request, path, args)
        try:
            found = self._found(path, args, form)
        except (NoSuchPage, NotFound, Invalid):
            # A name may end like this, so the exact one goes first.
            stem, _, ending = path.rpartition(".")
            if ending not in ("json", "csv"):
                raise
            form = ending
            found = self._found(stem or "/", args, form)
        if isinstance(found, Moved):
            joint = "&" if "?" in found.to else "?"
            return _moved(
                found.to if form == "html" or path.startswith(_API) else f"{found.to}{joint}format={form}"
            )
        return _sent(request, found)

    def _statistics(self, request: Request, path: str, args: Args) -> Response:
        """What the elements of a tensor are like. A digest has the same for ever."""
        _, named = self._map.bind("").match(path)
        found = dict(self._reader.ask(lambda registry: version.tensor(registry, named["digest"], args)))
        answer = measured.known(named["digest"]) or self._asking.ask(named["digest"], **found)
        label = f"{len(answer['histogram'])} parts from {answer['least']:.4g} to {answer['most']:.4g}"
        text = drawing.as_json({**answer, "picture": charts.histogram(answer["histogram"], label)})
        response = Response(text, mimetype="application/json")
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable"
        return response

    def _found(self, path: str, args: Args, form: str) -> Body | Moved:
        """The answer for an address: one that is kept, or a new one.

        Of several browsers that ask for the same page at a time one waits for it to be drawn, and the others get what was
        drawn after they had asked.
        """
        if form == "html" and (self._is_api_only or path.startswith(_API)):
            raise NoSuchPage
        asked, key = time.monotonic(), (path, tuple(sorted(args.items())), form)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        try:
            with turn:
                return self._kept_or_drawn(key, asked, path, args)
        finally:
            with self._lock:
                if key not in self._kept:
                    self._turns.pop(key, None)

    def _kept_or_drawn(self, key: _Key, asked: float, path: str, args: Args) -> Body | Moved:
        """See `_found`; it is this browser's turn."""
        kept = self._kept.get(key)
        if kept and kept.began >= asked:
            return kept.body
        began = time.monotonic()
        state = self._state(path)
        if kept and kept.state == state:
            return kept.body
        page = self._asked(path, args)
        if isinstance(page, Moved):
            return page
        body = self._drawn(page, path, args, key[2], state)
        with self._lock:
            self._kept[key] = _Kept(body, state, began)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT or sum(one.body.size for one in self._kept.values()) > _MOST_BYTES:
                self._turns.pop(self._kept.popitem(last=False)[0], None)
        return body

    def _state(self, path: str) -> State:
        """The state that a page depends on: only a few pages show what a run writes as it goes on."""
        state = self._reader.state()
        return state if _follows_runs(path) else state.of_log

    def _asked(self, path: str, args: Args) -> Page | Moved:
        """What the page of an address shows."""
        endpoint, named = self._map.bind("").match(path)
        if endpoint in _DIFFS:
            names, sides = self._reader.ask(lambda registry: diffs.sides(registry, args))
            return diffs.diff(self._asking, names, sides, args)
        if endpoint not in _PAGES:
            raise NoSuchPage
        page = self._reader.ask(lambda registry: _PAGES[endpoint](registry, args, **named))
        if isinstance(page, Page) and page.context.get("events"):
            page = runs.with_events(page, self._asking.ask(page.context["events"], run=page.title))
        return page

    def _drawn(self, page: Page, path: str, args: Args, form: str, state: State) -> Body:
        if page.problem and form != "html":
            raise page.problem
        if form == "json":
            text = drawing.as_json(page.document)
        elif form == "csv":
            if not page.rows and page.template not in _TABLES:
                raise NotFound("this page is no table", "ask for JSON")
            text = drawing.as_csv(page.rows)
        elif args.get("file") and page.context.get("html"):
            text = page.context["html"]
        else:
            text = drawing.as_html(page, **self._frame(path, args, state))
        data = text.encode("utf-8", "replace")
        packed = gzip.compress(data, 6, mtime=0) if len(data) > _SMALL else b""
        status = _status_of(page.problem) if page.problem else 200
        return Body(data, packed, form, hashlib.sha256(data).hexdigest()[:20], status)

    def _frame(self, path: str, args: Args, state: State) -> dict[str, Any]:
        """What the frame of every page shows."""
        given = {name: value for name, value in args.items() if name != "format"}
        return {
            "registry": self._reader.registry.place,
            "page_state": f"{self._begun}-{state.tag}",
            "follows": "all" if _follows_runs(path) else "log",
            "args": given,
            "whole": _whole(path, given),
            "as_json": address(*path.strip("/").split("/"), **given, format="json"),
            "as_csv": address(*path.strip("/").split("/"), **given, format="csv"),
            "allows_changes": self._allows_changes,
            "form_token": self._access.form_token,
        }

    def _failed(self, request: Request, error: RegistryError, status: int) -> Response:
        """An error, in the form that was asked for."""
        message, hint = error.for_command_line()
        is_json = (
            request.args.get("format") == "json" or _API in request.path or request.path.endswith(".json")
        )
        if is_json or self._is_api_only:
            document = {"error": {"kind": type(error).__name__, "message": message, "hint": hint or None}}
            return Response(drawing.as_json(document), status, mimetype="application/json")
        page = Page(
            "error.html", "Error", "", None, context={"message": message, "hint": hint, "status": status}
        )
        frame = self._frame("", {}, State(0))
        return Response(drawing.as_html(page, **frame), status, mimetype="text/html")


def _whole(path: str, args: Args) -> str:
    """The address of the page with whole curves; empty if it shows no part of one."""
    if not any(args.get(name) for name in zooming.NAMES):
        return ""
    rest = {name: value for name, value in args.items() if name not in zooming.NAMES}
    return address(*path.strip("/").split("/"), **rest)


_TABLES = (
    "models.html",
    "versions.html",
    "runs.html",
    "compare.html",
    "lineage.html",
    "storage.html",
    "data.html",
    "find.html",
)
"""Templates of pages that are a table, also an empty one."""


def _follows_runs(path: str) -> bool:
    """Whether a page shows what runs write as they go on."""
    return path in ("/", "/runs", "/compare") or path.startswith(("/r/", f"{_API}v1/runs"))


def _status_of(error: RegistryError) -> int:
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def _plain(text: str, status: int) -> Response:
    return Response(f"{text}\n", status, mimetype="text/plain")


def _moved(to: str, status: int = 302) -> Response:
    return Response("", status, headers={"Location": to}, mimetype="text/plain")


def _static(name: str) -> Response:
    """A file of the pages; there are only these few."""
    if name not in _STATIC:
        raise NoSuchPage
    data = resources.files("registry.ui").joinpath("static", name).read_bytes()
    return Response(data, mimetype=_STATIC[name], headers={"Cache-Control": "no-cache"})


def _sent(request: Request, body: Body) -> Response:
    """A body, unless the browser has it already."""
    tag = f'"{body.tag}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding, Cookie"}
    if tag in request.headers.get("If-None-Match", ""):
        return Response(status=304, headers=headers)
    if body.packed and "gzip" in request.headers.get("Accept-Encoding", ""):
        packed = {**headers, "Content-Encoding": "gzip"}
        return Response(body.packed, body.status, headers=packed, mimetype=_FORMS[body.form])
    return Response(body.data, body.status, headers=headers, mimetype=_FORMS[body.form])
