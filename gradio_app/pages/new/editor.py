"""The recipe being edited, and the components that depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.pages.components import html, on_event
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.templating import message
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.form import rebase_defaults
from gradio_app.recipe.paths import AllowedPaths, DataFiles, data_files
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.redaction import UPLOAD
from gradio_app.runs.formatting import format_bytes
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.uploads import Uploads

# Browsers keep the draft under it; a fixed one, or a server that was restarted could not read it.
_DRAFT = "lightning-peft-studio-draft"
Show = Callable[["Session"], Sequence[Any]]
Change = Callable[..., dict[str, Any]]
Updates = Callable[[Callable[[], bool]], Iterator[Any]]


@dataclass
class Session:
    """What one open page edits; kept by the server.

    Attributes:
        content: The recipe.
        baseline: What it was made of, to which settings can be reset.
        owner: Whose it is.
        field_errors: What is typed in settings and cannot be, by path.
        report: What is known of its data; ``None`` before that was asked, or for other data.
        notice: Something the visitor should read.
        copied_from: Name of the run that the recipe is a copy of; empty if it is not.
        suggested_name: What the run is to be called, for the field of the name; given once.
        displayed_yaml: The YAML that the page was given last.
        opened: Whether the page was opened since the server knows it. Otherwise the server was
            started again meanwhile, or has forgotten it, and what the page shows is not this.
        latest_calls: The latest call of each handler; those before it show nothing.
        checking: The data that is being looked at; ``None`` if none is.
        stopped: Whether the visitor has stopped that.
        rows_read: How many rows of it have been read.
        early_report: What is known of the first rows of large data that is being looked at.
        from_draft: Whether it was opened with the draft of the browser.
        undo: Recipe and what it was made of before the task was changed; ``None`` for none.
        starting: Whether a run is being started.
        edited_copy: Name of the upload with a row edited here; empty for none.
        data_files: The files below the data root, as they were at the last change.
    """

    content: dict[str, Any]
    baseline: dict[str, Any]
    owner: str = "local"
    field_errors: dict[str, UserError] = field(default_factory=dict)
    report: Any = None
    notice: str = ""
    copied_from: str = ""
    suggested_name: str = ""
    displayed_yaml: str = ""
    opened: bool = False
    latest_calls: dict[str, object] = field(default_factory=dict)
    checking: Any = None
    stopped: bool = False
    rows_read: int = 0
    early_report: Any = None
    from_draft: bool = False
    undo: Any = None
    starting: bool = False
    edited_copy: str = ""
    data_files: DataFiles = field(default_factory=DataFiles)

    def while_current(
        self, name: str, updates: Iterator[Any] | Updates, nothing: Any
    ) -> Iterator[Any]:
        """Yields what a handler shows, until the recipe changes or the handler is called again.

        Args:
            name: Of the handler.
            updates: What it shows, or what makes that; it is given what says whether that is still
                wanted.
            nothing: What changes nothing of what is shown.
        """
        this, content = object(), self.content
        self.latest_calls[name] = this

        def current() -> bool:
            return self.latest_calls[name] is this and self.content is content

        for shown in updates(current) if callable(updates) else updates:
            if not current():
                break
            yield shown
        if not current():
            # When a generator ends, Gradio sends its last value once more.
            yield nothing


class Editor:
    """The parts of the page that belong together."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        first = base_recipe("sft")
        self.session = gr.State(Session(first, first))
        self.draft = gr.BrowserState({}, storage_key=_DRAFT, secret=_DRAFT)
        # Memory and disk that the plan finds, shown next to the start.
        self.needs = gr.HTML(padding=False, render=False, elem_id="start-needs")
        self._displays: list[tuple[list[Any], Show]] = []
        self._bindings: list[Callable[[], Any]] = []
        self._follows: list[tuple[Callable[..., Any], list[Any], list[Any]]] = []

    def show(self, components: Sequence[Any], update: Show) -> None:
        """Adds components that show some of the recipe, and what they then show."""
        self._displays.append((list(components), update))

    def after_change(
        self, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any]
    ) -> None:
        """Adds a handler that is called after every change, with the session first.

        The first one that is added looks at the data; the others wait for what it finds.
        """
        self._follows.append((handler, [self.session, *inputs], outputs))

    @property
    def outputs(self) -> list[Any]:
        """Everything that changes with the recipe."""
        return [self.session, self.draft, *(one for ones, _ in self._displays for one in ones)]

    def updates(self, session: Session) -> list[Any]:
        """Returns the values of all components."""
        root = self.studio.settings.data_root
        # Looked up each time: files come and go while the page is open.
        session.data_files = data_files(root) if root else DataFiles()
        found: list[Any] = [session, draft_of(session)]
        for components, update in self._displays:
            values = list(update(session))
            assert len(values) == len(components)
            found += values
        return found

    def on_finish(self, binding: Callable[[], Any]) -> None:
        """Adds an event that is bound when all components are made."""
        self._bindings.append(binding)

    def finish(self) -> None:
        """Binds all events."""
        for binding in self._bindings:
            binding()

    def bind(
        self,
        event: Callable[..., Any],
        change: Change,
        inputs: Sequence[Any] = (),
        own: bool = False,
        problem: Any = None,
    ) -> None:
        """Makes an event change the recipe, and everything that shows it follow.

        Args:
            event: Such as ``button.click``.
            change: Takes the session and the values of ``inputs``, and returns the new recipe.
            inputs: Components.
            own: Whether settings that change are the visitor's own changes; else they go with what
                was chosen, and count as unchanged.
            problem: HTML of :meth:`problem` that says why nothing was changed; else a notice does.
        """

        def handle(session: Any, request: gr.Request, *given: Any) -> list[Any]:
            session = self.of(session, request)
            try:
                content = change(session, *given)
            except UserError as refused:
                if problem is None:
                    raise
                text = f"\u2717 {localized_message(refused, self.t)}"
                shown = [gr.skip()] * len(self.outputs)
                shown[self.outputs.index(problem)] = message(
                    "field-problem", text, self.t, role="alert"
                )
                return shown
            _replace_content(session, content, own)
            return self.updates(session)

        self._bind(event, handle, [self.session, *inputs], trigger_mode="multiple")

    def problem(self, name: str) -> Any:
        """Returns a place for why something was refused; it is empty again after any change."""
        made = html(elem_id=name, elem_classes="problem-place")
        self.show([made], lambda session: [""])
        return made

    def bind_event(self, event: Callable[..., Any], change: Change) -> None:
        """Does the same for an event that tells what it is about: a click in HTML of the page."""

        def handle(session: Any, request: gr.Request, data: gr.EventData) -> list[Any]:
            session = self.of(session, request)
            _replace_content(session, change(session, data), own=True)
            return self.updates(session)

        self._bind(event, handle, [self.session])

    def _bind(self, event: Any, handle: Any, inputs: list[Any], **options: Any) -> None:
        self.on_finish(
            lambda: self.then(on_event(self.t, event, handle, inputs, self.outputs, **options))
        )

    def then(self, event: Any) -> Any:
        """Lets everything follow an event that has changed the session."""
        look, *others = self._follows
        looked = self._success(event, look)
        for other in others:
            self._success(looked, other)
        return event

    def _success(self, event: Any, follows: tuple[Any, list[Any], list[Any]]) -> Any:
        handler, inputs, outputs = follows
        options = {"trigger_mode": "always_last", "api_visibility": "private"}
        return event.success(handler, inputs, outputs, **options)

    def of(self, session: Any, request: gr.Request) -> Session:
        """Returns the session of who asks.

        Raises UserError if the server does not know what the page shows.
        """
        if not isinstance(session, Session) or not session.opened:
            raise UserError("checks.session")
        session.owner = self.studio.owner(request)
        return session

    def files_hint(self, session: Session, hint: str) -> dict[str, Any]:
        """Returns the help of a field that lists the data files; always shown if some are not."""
        more = session.data_files.left_out
        if not more:
            return {"info": hint, "elem_classes": []}
        info = f"{hint}. {self.t('new.files_cut', count=self.t.number(more))}"
        return {"info": info, "elem_classes": ["warns"]}

    def data_choices(self, session: Session) -> list[tuple[str, str]]:
        """Returns the data files below the root and the uploads, labelled with their sizes."""
        uploads = Uploads(self.studio.settings, session.owner).list()
        found = [(name, name, size) for name, size in session.data_files.sizes.items()]
        found += [(one.title, f"{UPLOAD}{one.name}", one.size) for one in uploads]
        return [(f"{title} ({format_bytes(size, self.t)})", name) for title, name, size in found]

    def listed_name(self, session: Session, place: str) -> str:
        """Returns the name in :meth:`data_choices` of where data lies; other places as they are."""
        root, sizes = self.studio.settings.data_root, session.data_files.sizes
        return next((one for one in sizes if root and (root / one).as_posix() == place), place)

    def places(self, session: Session) -> AllowedPaths:
        """Returns the places that the owner of a session may read."""
        return AllowedPaths(self.studio.settings, session.owner)


def draft_of(session: Session) -> dict[str, str]:
    """Returns the draft kept by the browser: the recipe and its choices."""
    return {"recipe": dump_yaml(session.content), "since": dump_yaml(session.baseline)}


def _replace_content(session: Session, content: dict[str, Any], own: bool) -> None:
    """Makes a session's recipe another one; what was found of other data counts no more."""
    if content is session.content:
        return
    if not own:
        session.baseline = rebase_defaults(session.baseline, session.content, content)
    if content.get("data") != session.content.get("data"):
        session.report = None
    if content != session.content:
        # What is asked about the same recipe already is not asked once more.
        session.content = content
    session.field_errors = {}
