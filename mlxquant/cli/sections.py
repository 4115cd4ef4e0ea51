"""Help in sections: which options are for which kind of output."""

from __future__ import annotations

from typing import Any

import click


class SectionOption(click.Option):
    """An option that `--help` lists under `section`."""

    def __init__(self, *names: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


class SectionCommand(click.Command):
    """Lists options without a section first, then section by section, in the order they were given."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "") or "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def given(ctx: click.Context, section: str) -> list[str]:
    """The options of a section that stand on the command line, as they are written there: --bits."""
    source = click.core.ParameterSource.COMMANDLINE
    return [
        parameter.opts[0]
        for parameter in ctx.command.params
        if getattr(parameter, "section", "") == section
        and parameter.name
        and ctx.get_parameter_source(parameter.name) is source
    ]
