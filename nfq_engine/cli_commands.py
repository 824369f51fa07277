"""tproxyctl's commands by name: looking inside, saving and restoring, running programs.

Owns: arguments, and tables on a terminal. What is shown comes from the control socket, whole.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import click

from nfq_engine import cli_watch
from nfq_engine.cli_forms import CODES, ask, console, endpoint, examples, flow, table

_RULES_HELP: Final = f"""\b
Rules are given as to iptables, without -t:
  tproxyctl -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 50080
  tproxyctl -A|-I|-R|-D|-C CHAIN ...   -F|-Z|-S [CHAIN]   -N|-X CHAIN   -E CHAIN NAME   -P CHAIN ACCEPT|DROP
  tproxyctl -L [CHAIN] -n -v -x --line-numbers
\b
Matches: -p -s -d -i -o --sport --dport, each with !, ports as ranges; -m multiport, mark, comment, addrtype, limit,
statistic, and, from OUTPUT, owner.
Targets: TPROXY --on-port PORT [--on-ip ADDRESS], ACCEPT, DROP, RETURN, or a chain of your own.
\b
Exit codes: {CODES}"""

_as_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(epilog=_RULES_HELP, context_settings={"help_option_names": ["--help"]})
def commands() -> None:
    """Talk to the tproxy engine of this network namespace: look inside, and change its ruleset."""


@commands.command(epilog=examples("sockrefs", "sockrefs --json", "sockrefs --proc"))
@_as_json
@click.option("--proc", is_flag=True, help="In the layout of /proc/net/tproxy.")
def sockrefs(*, as_json: bool, proc: bool) -> None:
    """The sockets that own a foreign address."""
    entries = ask({"call": "sockrefs"})["sockrefs"]
    if proc:
        for entry in entries:
            click.echo(_proc_line(entry))
        return
    _show(entries, as_json, ("protocol", "foreign", "local", "remote", "flags", "related", "sockets"), _sockref_row)


@commands.command(epilog=examples("connections", "connections --json"))
@_as_json
def connections(*, as_json: bool) -> None:
    """The connections that came through the queue, with the addresses of each step."""
    entries = ask({"call": "connections"})["connections"]
    columns = ("protocol", "state", "original", "inside", "reply", "packets", "by", "expires in")
    _show(entries, as_json, columns, _connection_row)


@commands.command(epilog=examples("counters", "counters --json"))
@_as_json
def counters(*, as_json: bool) -> None:
    """Packets by hook and reason, the queue's own counts, and how much there is of what."""
    values = ask({"call": "counters"})["counters"]
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    listing = table(("hook", "reason", "packets"))
    for hook, reasons in values["hooks"].items():
        for reason, packets in reasons.items():
            if packets:
                listing.add_row(hook, reason, str(packets))
    for why, packets in values["malformed"].items():
        listing.add_row("", f"malformed: {why}", str(packets))
    console().print(listing)
    queue = values["queue"]
    click.echo(f"datapath: {values['datapath']}; sockrefs: {values['sockrefs']}; connections: {values['connections']}")
    click.echo(
        f"queue: {queue['waiting']} waiting, {queue['dropped_full']} dropped because it was full, "
        f"{queue['dropped_unread']} because they could not be read"
    )


@commands.command(epilog=examples("save > rules.txt", "save --counters"))
@click.option("-c", "--counters", is_flag=True, help="With packet and byte counts.")
def save(*, counters: bool) -> None:
    """Print the tproxy table as iptables-save text."""
    click.echo(ask({"call": "save", "counters": counters})["text"], nl=False)


@commands.command(epilog=examples("restore rules.txt", "restore --test < rules.txt"))
@click.argument("file", type=click.File("rb"), default="-")
@click.option("-c", "--counters", is_flag=True, help="Take the counts of the text over.")
@click.option("-n", "--noflush", is_flag=True, help="Add to the table instead of replacing it.")
@click.option("-t", "--test", is_flag=True, help="Check the text, and change nothing.")
def restore(file: BinaryIO, *, counters: bool, noflush: bool, test: bool) -> None:
    """Replace the tproxy table by iptables-save text, from FILE or standard input: all of it, or nothing."""
    try:
        text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"the ruleset is not UTF-8 text: {error.reason} at byte {error.start}") from error
    request = {"call": "restore", "text": text, "counters": counters, "noflush": noflush, "test": test}
    for line in ask(request)["output"]:
        click.echo(line)


@commands.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "run -- ./proxy --port 50080",
        "run --recvorigaddrs -- ./udp-proxy",
        codes="the program's own; 126 it cannot be run; 127 there is none; 1 its calls cannot be served; 2 usage.",
    ),
)
@click.option(
    "--recvorigaddrs",
    is_flag=True,
    help="Serve IP_RECVORIGADDRS too: recvmsg tells where datagrams were sent. It costs every recvmsg of the program.",
)
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def run(program: tuple[str, ...], *, recvorigaddrs: bool) -> None:
    """Run a program that was written for tproxy, unmodified: tproxyctl run -- PROGRAM ARGS...

    Its setsockopt and getsockopt calls with IP_TPROXY (and SO_ORIGINAL_DST) are answered by the engine; all other calls
    run at full speed. Without an engine they fail with ENOPROTOOPT, as on a kernel without tproxy. Pid, signals and
    exit status are the program's; 126 and 127 tell that it cannot be run.
    """
    # Not with the rest: the supervisor is a fifth of what this command is to start, and no other command needs it.
    from nfq_engine.shell.seccomp import ORIGINAL_DST_OPTIONS, TPROXY_OPTIONS, SeccompError
    from nfq_engine.shell.supervisor_engine import EngineHandler, EngineReceiver
    from nfq_engine.shell.supervisor_launch import Supervision, SupervisorError, run_program

    supervision = Supervision(
        TPROXY_OPTIONS | ORIGINAL_DST_OPTIONS,
        lambda: EngineHandler(has_receiver=recvorigaddrs),
        EngineReceiver if recvorigaddrs else None,
    )
    try:
        run_program(program, supervision)
    except (SeccompError, SupervisorError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        click.echo(f"tproxyctl: cannot run {program[0]}: {error.strerror}", err=True)
        sys.exit(127 if error.errno == errno.ENOENT else 126)


def _proc_line(entry: dict[str, Any]) -> str:
    """A sockref as /proc/net/tproxy had it: protocol, ends as hex:hex, flags, related and sockets, time hashed."""
    from nfq_engine.core.packet import Protocol

    ends = " ".join(
        f"{ipaddress.ip_address(entry[end]['address']).packed.hex()}:{entry[end]['port']:04x}"
        for end in ("foreign", "local", "remote")
    )
    number = Protocol[entry["protocol"].upper()].value
    return f"{number:02x} {ends} {entry['flags_value']:08x} {entry['related']} {entry['sockets']} {entry['hashed']:.0f}"


_Row = Callable[[dict[str, Any]], tuple[str, ...]]


def _sockref_row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        entry["protocol"],
        endpoint(entry["foreign"]),
        endpoint(entry["local"]),
        endpoint(entry["remote"]),
        "|".join(entry["flags"]),
        str(entry["related"]),
        str(entry["sockets"]),
    )


def _connection_row(entry: dict[str, Any]) -> tuple[str, ...]:
    # Without accounting the kernel counts nothing.
    packets = {way: "-" if count is None else count for way, count in entry["packets"].items()}
    return (
        entry["protocol"],
        entry["state"],
        flow(entry["original"]),
        flow(entry["inside"]) if entry["is_mapped"] else "",
        flow(entry["reply"]),
        f"{packets['original']} / {packets['reply']}",
        entry["rule"] or ("sockref" if entry["is_mapped"] else ""),
        f"{entry['expires_in']:.0f} s",
    )


def _show(entries: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...], row: _Row) -> None:
    """Print a listing, as JSON or as a table."""
    if as_json:
        click.echo(json.dumps(entries, indent=2))
        return
    listing = table(columns)
    for entry in entries:
        listing.add_row(*row(entry))
    console().print(listing)


for _command in (cli_watch.monitor, cli_watch.trace, cli_watch.top):
    commands.add_command(_command)
