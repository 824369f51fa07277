"""Whatever is no command is refused, by name, and changes nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import CASES

from nfq_engine.core.rule_text import RuleError, parse_command, restore, save, split_words
from nfq_engine.core.ruleset import Ruleset

REFUSED = {
    "": "no command specified",
    "-j ACCEPT": "no command specified",
    "-A": 'option "-A" requires an argument',
    "-A PREROUTING -L": "cannot use -L with -A",
    "-A PREROUTING -A PREROUTING": "cannot use -A with -A",
    "! -A PREROUTING": "cannot have ! before -A",
    "-A PREROUTING foo": "Bad argument `foo'",
    "-A PREROUTING -": "Bad argument `-'",
    "-A PREROUTING -y": 'unknown option "-y"',
    "-A PREROUTING -0": 'unknown option "-0"',
    "-A PREROUTING --": 'unknown option "--"',
    "-A PREROUTING --frob 1": 'unknown option "--frob"',
    "-A PREROUTING --d 80": 'unknown option "--d"',
    "-A PREROUTING --syn": 'unknown option "--syn"',
    "-A PREROUTING -p tcp --tcp-flags SYN SYN": 'unknown option "--tcp-flags"',
    "-A PREROUTING -p tcp -j REDIRECT --to-ports 80": 'unknown option "--to-ports": target `REDIRECT\' takes none',
    "-A PREROUTING -f": 'unknown option "-f"',
    "-A PREROUTING -4": 'unknown option "-4"',
    "-A PREROUTING -n": "illegal option `-n' with this command: -A",
    "-A PREROUTING --line-numbers": "illegal option `--line-numbers' with this command: -A",
    "-L -j ACCEPT": "illegal option `-j' with this command: -L",
    "-S -n": "illegal option `-n' with this command: -S",
    "-D PREROUTING -c 1 2": "illegal option `-c' with this command: -D",
    "-D PREROUTING 1 -j ACCEPT": "illegal option `-j' with a rule number",
    "-t nat -L": "table `nat' does not exist: there is only `tproxy'",
    # Numbers and names of rules and chains.
    "-D PREROUTING x": "invalid rule number `x'",
    "-D PREROUTING 0": "invalid rule number `0'",
    "-I PREROUTING 0": "invalid rule number `0'",
    "-I PREROUTING 99999999999999999999999": "invalid rule number `99999999999999999999999'",
    "-R PREROUTING -j ACCEPT": "-R requires a chain and a rule number",
    "-R PREROUTING 1 -s 1.1.1.1,2.2.2.2": "replacement rule does not specify a unique address",
    "-P OUTPUT": "-P requires a chain and a policy",
    "-P OUTPUT RETURN": "bad policy name `RETURN': there are ACCEPT, DROP",
    "-E user": "-E requires old-chain-name and new-chain-name",
    "-E user TPROXY": "chain name `TPROXY' may not clash with target name",
    "-N ACCEPT": "chain name `ACCEPT' may not clash with target name",
    "-N -a": "chain name `-a' not allowed to start with `-'",
    "-N !a": "chain name `!a' not allowed to start with `!'",
    '-N ""': "invalid chain name `'",
    '-N "a b"': "invalid chain name `a b'",
    "-N a\\b": "invalid chain name `a\\b'",
    f"-N {'a' * 29}": f"chain name `{'a' * 29}' too long (must be under 29 chars)",
    # Counts.
    "-A PREROUTING -c 5": "-c requires packet and byte counter",
    "-A PREROUTING -c x 5": "-c packet counter not numeric: `x'",
    "-A PREROUTING -c 5 x": "-c byte counter not numeric: `x'",
    "-A PREROUTING -c 5,": "-c byte counter not numeric: `'",
    "-A PREROUTING -c 1 2 -c 1 2": "multiple -c flags not allowed",
    # Protocols.
    "-A PREROUTING -p icmp": 'unknown protocol "icmp" specified: the table knows tcp, udp and all',
    "-A PREROUTING -p 1": 'protocol "1" is not supported: the table sees tcp and udp',
    "-A PREROUTING -p 300": 'unknown protocol "300" specified: the table knows tcp, udp and all',
    "-A PREROUTING ! -p all": "rule would never match protocol",
    "-A PREROUTING -p tcp -p udp": "multiple -p flags not allowed",
    "-A PREROUTING ! ! -p tcp": "multiple consecutive ! not allowed",
    "-A PREROUTING ! -p ! tcp": "multiple consecutive ! not allowed",
    "-A PREROUTING -p tcp !": "nothing appropriate following !",
    # Addresses and interfaces.
    "-A PREROUTING -s": 'option "-s" requires an argument',
    "-A PREROUTING -s !": 'option "-s" requires an argument',
    "-A PREROUTING -s example.org": "host/network `example.org' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.256": "host/network `10.0.0.256' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.0.1": "host/network `10.0.0.0.1' not found: names are not resolved",
    "-A PREROUTING -s 10./8": "host/network `10.' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.1/8/9": "host/network `10.0.0.1/8' not found: names are not resolved",
    "-A PREROUTING -s 10.0.0.1,": "host/network `' not found: names are not resolved",
    "-A PREROUTING -s fe80::1%lo": "host/network `fe80::1%lo' not found: names are not resolved",
    "-A PREROUTING -s ::1::": "host/network `::1::' not found: names are not resolved",
    "-A PREROUTING -d 10.0.0.1/33": "invalid mask `33' specified",
    "-A PREROUTING -d 10.0.0.1/": "invalid mask `' specified",
    "-A PREROUTING -d 10.0.0.1/255.255": "invalid mask `255.255' specified",
    "-A PREROUTING -d 10.0.0.1/ffff::": "invalid mask `ffff::' specified",
    "-A PREROUTING -d ::1/129": "invalid mask `129' specified",
    "-A PREROUTING -d ::1/255.0.0.0": "invalid mask `255.0.0.0' specified",
    "-A PREROUTING ! -s 1.1.1.1,2.2.2.2": (
        "! not allowed with multiple source or destination IP addresses `1.1.1.1,2.2.2.2'"
    ),
    "-A PREROUTING -s 10.0.0.1 -d ::1": "addresses of both families in one rule: 10.0.0.1, ::1",
    "-A PREROUTING -s ::1 -p tcp -j TPROXY --on-port 1 --on-ip 1.2.3.4": (
        "addresses of both families in one rule: ::1, 1.2.3.4"
    ),
    '-A PREROUTING -i ""': "empty interface is likely to be undesired",
    "-A PREROUTING -i a123456789012345": "interface name `a123456789012345' is longer than 15 characters",
    "-A PREROUTING -i a/b": "interface name `a/b' has a character that the kernel does not allow",
    "-A PREROUTING -o eth0": "can't use -o with PREROUTING",
    "-A OUTPUT -i eth0": "can't use -i with OUTPUT",
    # Ports.
    "-A PREROUTING --dport 80": 'unknown option "--dport"',
    "-A PREROUTING ! -p tcp --dport 80": 'unknown option "--dport"',
    "-A PREROUTING -m tcp --dport 80": "match `tcp' needs `-p tcp'",
    "-A PREROUTING -p udp -m tcp": "match `tcp' needs `-p tcp'",
    "-A PREROUTING ! -p udp -m udp": "match `udp' needs `-p udp'",
    "-A PREROUTING -p tcp --dport": 'option "--dport" requires an argument',
    "-A PREROUTING -p tcp --dport 80x": "invalid port/service `80x' specified",
    "-A PREROUTING -p tcp --dport http": "invalid port/service `http' specified",
    "-A PREROUTING -p tcp --dport 65536": "invalid port/service `65536' specified",
    "-A PREROUTING -p tcp --dport -1": "invalid port/service `-1' specified",
    "-A PREROUTING -p tcp --dport=": "invalid port/service `' specified",
    "-A PREROUTING -p tcp --dport 80:90:100": "invalid port/service `90:100' specified",
    "-A PREROUTING -p tcp --dport 90:80": "invalid portrange (min > max) `90:80'",
    "-A PREROUTING -p tcp --dport 80 --destination-port 81": (
        'tcp: option "--destination-port" can only be used once.'
    ),
    # Targets.
    "-A PREROUTING -j ACCEPT -j DROP": "multiple -j flags not allowed",
    "-A PREROUTING -j ACCEPT -g user": "cannot use -g with -j",
    "-A PREROUTING ! -j ACCEPT": "cannot have ! before -j",
    "-A PREROUTING --jump=": "invalid target name (too short)",
    "-A PREROUTING -p tcp -j TPROXY": 'TPROXY: option "--on-port" must be specified',
    "-A PREROUTING -p tcp -j TPROXY --on-port 65536": 'TPROXY: bad port for option "--on-port": `65536\'',
    "-A PREROUTING -p tcp -j TPROXY --on-port 0x50": 'TPROXY: bad port for option "--on-port": `0x50\'',
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-port 2": 'TPROXY: option "--on-port" can only be used once.',
    "-A PREROUTING -p tcp -j TPROXY ! --on-port 1": 'TPROXY: option "--on-port" cannot be inverted.',
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-ip x": 'TPROXY: bad address for option "--on-ip": `x\'',
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --on-ip 10.0.0.0/8": (
        'TPROXY: bad address for option "--on-ip": `10.0.0.0/8\''
    ),
    "-A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 1": 'unknown option "--tproxy-mark"',
    "-A PREROUTING -j TPROXY --on-port 1": "TPROXY needs `-p tcp' or `-p udp'",
    "-A PREROUTING ! -p tcp -j TPROXY --on-port 1": "TPROXY needs `-p tcp' or `-p udp'",
    "-A PREROUTING -p tcp --on-port 1 -j TPROXY": 'unknown option "--on-port"',
    # Other matches.
    "-A PREROUTING -m": 'option "-m" requires an argument',
    "-A PREROUTING ! -m mark --mark 1": "cannot have ! before -m",
    "-A PREROUTING -m state --state NEW": (
        "match `state' is not supported: there are addrtype, comment, limit, mark, multiport, owner, statistic, "
        "tcp, udp"
    ),
    "-A PREROUTING -m multiport --dports 80": "multiport needs `-p tcp' or `-p udp'",
    "-A PREROUTING ! -p tcp -m multiport --dports 80": "multiport needs `-p tcp' or `-p udp'",
    "-A PREROUTING -p tcp -m multiport": "multiport: exactly one of --sports, --dports and --ports must be specified",
    "-A PREROUTING -p tcp -m multiport --sports 1 --dports 2": (
        "multiport: exactly one of --sports, --dports and --ports must be specified"
    ),
    "-A PREROUTING -p tcp -m multiport --dports 80,,81": "invalid port/service `' specified",
    "-A PREROUTING -p tcp -m multiport --dports 80:": "invalid port/service `' specified",
    "-A PREROUTING -p tcp -m multiport --dports 80:80": "invalid portrange specified: `80:80'",
    "-A PREROUTING -p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15:16": (
        "multiport: too many ports specified, more than 15: `1,2,3,4,5,6,7,8,9,10,11,12,13,14,15:16'"
    ),
    "-A PREROUTING -m mark": 'mark: option "--mark" must be specified',
    "-A PREROUTING -m mark -m mark --mark 1": 'mark: option "--mark" must be specified',
    "-A PREROUTING -m mark --mark x": 'mark: bad integer value for option "--mark", or out of range: `x\'',
    "-A PREROUTING -m mark --mark 1/": 'mark: bad integer value for option "--mark", or out of range: `1/\'',
    "-A PREROUTING -m mark --mark 0x100000000": (
        'mark: bad integer value for option "--mark", or out of range: `0x100000000\''
    ),
    "-A PREROUTING -m comment": 'comment: option "--comment" must be specified',
    "-A PREROUTING -m comment ! --comment x": 'comment: option "--comment" cannot be inverted.',
    "-A PREROUTING -m comment --comment a\x1bb": "comment: unprintable character in `a\\x1bb'",
    f"-A PREROUTING -m comment --comment {'x' * 256}": f"comment: longer than 255 bytes: `{'x' * 80}...'",
    "-A PREROUTING -m addrtype": "addrtype: you must specify --src-type or --dst-type",
    "-A PREROUTING -m addrtype --dst-type foo": 'addrtype: bad type "foo"',
    "-A PREROUTING -m addrtype --dst-type LOCAL,": 'addrtype: bad type ""',
    "-A PREROUTING -m addrtype --dst-type anycast": (
        'addrtype: type "ANYCAST" is not supported: there are UNICAST, LOCAL, BROADCAST, MULTICAST'
    ),
    "-A PREROUTING -m addrtype --limit-iface-in": 'unknown option "--limit-iface-in"',
    "-A OUTPUT -m owner": "owner: at least one of --uid-owner, --gid-owner is required",
    "-A OUTPUT -m owner --uid-owner root": (
        'owner: bad value for "--uid-owner" option: "root": names are not resolved'
    ),
    "-A OUTPUT -m owner --gid-owner 6-5": ('owner: bad value for "--gid-owner" option: "6-5": names are not resolved'),
    "-A OUTPUT -m owner --uid-owner 4294967295": (
        'owner: bad value for "--uid-owner" option: "4294967295": names are not resolved'
    ),
    "-A OUTPUT -m owner --socket-exists": 'unknown option "--socket-exists"',
    "-A PREROUTING -m limit --limit x": 'bad rate "x"',
    "-A PREROUTING -m limit --limit 0": 'bad rate "0"',
    "-A PREROUTING -m limit --limit 5/": 'bad rate "5/"',
    "-A PREROUTING -m limit --limit 5/seconds": 'bad rate "5/seconds"',
    "-A PREROUTING -m limit --limit 10001/s": 'Rate too fast "10001/s"',
    "-A PREROUTING -m limit ! --limit 5/s": 'limit: option "--limit" cannot be inverted.',
    "-A PREROUTING -m limit --limit-burst 0": (
        'limit: bad value for option "--limit-burst", or out of range (1-10000): `0\''
    ),
    "-A PREROUTING -m limit --limit-burst 10001": (
        'limit: bad value for option "--limit-burst", or out of range (1-10000): `10001\''
    ),
    "-A PREROUTING -m statistic": 'statistic: option "--mode" must be specified',
    "-A PREROUTING -m statistic --mode foo": 'statistic: bad mode "foo"',
    "-A PREROUTING -m statistic --mode random": "statistic: --probability must be specified when using random mode",
    "-A PREROUTING -m statistic --mode nth --every 3": "statistic: --packet must be specified when using nth mode",
    "-A PREROUTING -m statistic --mode nth --every 3 --packet 0 --probability 1": (
        "statistic: --probability cannot be used with nth mode"
    ),
    "-A PREROUTING -m statistic --mode random --probability 1.1": (
        'statistic: bad value for option "--probability", or out of range (0-1): `1.1\''
    ),
    "-A PREROUTING -m statistic --mode random --probability nan": (
        'statistic: bad value for option "--probability", or out of range (0-1): `nan\''
    ),
    "-A PREROUTING -m statistic --mode nth --every 0 --packet 0": (
        'statistic: bad value for option "--every", or out of range (1-4294967295): `0\''
    ),
    "-A PREROUTING -m statistic --mode nth --every 3 --packet 3": (
        "statistic: the --packet p must be 0 <= p <= n-1: `3'"
    ),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=list(REFUSED))
def test_a_bad_command_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_command(split_words(line))
    assert str(caught.value) == message


def _known_words() -> list[str]:
    """Everything that means something, so that garbage gets deep into the parser."""
    return sorted({word for line in [*REFUSED, *(case.written for case in CASES)] for word in line.split()})


def refusal_of(ruleset: Ruleset, arguments: list[str]) -> str | None:
    try:
        ruleset.apply(parse_command(arguments))
    except RuleError as error:
        return str(error)
    return None


@given(st.lists(st.sampled_from(_known_words()) | st.text(max_size=12), max_size=12))
def test_garbage_is_refused_or_done_and_never_anything_else(arguments: list[str]) -> None:
    ruleset = Ruleset(random.Random(0))
    restore("*tproxy\n-N user\n-A PREROUTING -j user -c 1 2\nCOMMIT\n", ruleset)
    before = save(ruleset, counters=True)
    refusal = refusal_of(ruleset, arguments)
    if refusal is not None:
        assert refusal.isprintable()
        assert save(ruleset, counters=True) == before
    saved = save(ruleset, counters=True)
    again = Ruleset(random.Random(0))
    restore(saved, again, counters=True)
    assert save(again, counters=True) == saved
