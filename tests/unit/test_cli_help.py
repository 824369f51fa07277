"""The help of the engine's commands."""

from __future__ import annotations

from click.testing import CliRunner

from nfq_engine.cli_commands import commands
from nfq_engine.daemon import main as tproxyd


def test_every_command_has_examples_and_exit_codes() -> None:
    for command in ("", *commands.commands):
        text = CliRunner().invoke(commands, [*command.split(), "--help"], prog_name="tproxyctl").stdout
        assert f"  tproxyctl {command}" in text.partition("Options:")[2].partition("--help")[2], text
        assert "Exit codes: " in text
    text = CliRunner().invoke(tproxyd, ["--help"], prog_name="tproxyd").stdout
    assert "  tproxyd --" in text.partition("Examples:")[2]
