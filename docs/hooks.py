"""What MkDocs can't say in mkdocs.yml: pages that lie outside of docs/, and short cross references in docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_context_prune"
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""Files of the repository's root, and their pages."""
OUTSIDE_GLOBS = (
    *("benchmarks/RESULTS.md", "benchmarks/*.png", "model_cards/*.*", "model_cards/exports/*.md"),
    *("examples/*.py", "examples/*.ipynb"),
)
"""Further files of the site; they keep their paths."""
ROOMS = (
    ("core", ("config", "errors")),
    *((room, (room,)) for room in ("utils", "modeling", "storage", "data", "evaluation", "pruning", "training")),
    *((room, (room,)) for room in ("export", "publishing", "pipelines", "cli")),
)
"""The pages of the internal reference, from the bottom up: name, modules or packages."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside of docs/, and the pages of the internal reference."""
    outside = {name: ROOT / name for pattern in OUTSIDE_GLOBS for name in _names(pattern)}
    outside |= {page: ROOT / name for name, page in OUTSIDE.items()}
    for page, path in outside.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    for room, modules in ROOMS:
        text = "\n\n".join(
            f"::: {PACKAGE}.{name}\n    options:\n      show_submodules: true\n      heading_level: 2"
            for name in modules
        )
        files.append(File.generated(config, f"reference/internals/{room}.md", content=f"# {room}\n\n{text}\n"))
    return files


def _names(pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern))]


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to the pages of the site: in the repository they lead out of docs/, or from its root into it."""
    if page.file.src_uri in OUTSIDE.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    for name, target in OUTSIDE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}", f"]({target}", markdown)
    markdown = markdown.replace("](../docs/", "](../")
    return re.sub(r"\]\(\.\./(benchmarks|model_cards|examples)/", r"](\1/", markdown)


class PackageDocstrings(griffe.Extension):
    """Give the links [`name`][] of docstrings their full path: of a public name, one in scope, or the first found."""

    _link = re.compile(r"\[`([\w.]+)`\]\[\]")

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Show an option as its default and its help text, as a field of a config says them."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option" and len(call.arguments) > 1:
            default, text = call.arguments[:2]
            attr.value = default
            if attr.docstring is None:
                words = ast.literal_eval(str(text).removeprefix("f"))
                constants = {
                    k: item.value for k, item in attr.module.members.items() if isinstance(item, griffe.Attribute)
                }
                filled = re.sub(r"\{(\w+)\}", lambda match: str(constants.get(match[1], match[1])), words)
                attr.docstring = griffe.Docstring(filled, parent=attr)

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrite the docstrings of the whole package."""
        if pkg.path != PACKAGE:
            return
        objects = list(_objects(pkg))
        homes: dict[str, str] = {}
        for item in sorted(objects, key=lambda item: (item.is_attribute, item.path)):
            for name in (item.name, ".".join(item.path.split(".")[-2:])):
                homes.setdefault(name, item.path)
        public = {str(name): f"{pkg.path}.{name}" for name in pkg.exports or ()}

        def full(match: re.Match[str], item: griffe.Object) -> str:
            name = match[1]
            found = public.get(name) or _in_scope(item, name) or homes.get(name)
            return match[0] if found is None else f"[`{name}`][{found}]"

        for item in objects:
            if item.docstring is not None:
                item.docstring.value = self._link.sub(lambda match, of=item: full(match, of), item.docstring.value)


def _objects(item: griffe.Object) -> list[griffe.Object]:
    own = [member for member in item.members.values() if not member.is_alias]
    return [item, *(deeper for member in own for deeper in _objects(member))]


def _in_scope(item: griffe.Object | None, name: str) -> str | None:
    while item is not None:
        if name in item.members:
            member = item.members[name]
            return member.target_path if member.is_alias else member.path
        item = item.parent
    return None
