"""Reports of labs that ran, read as text and in a browser."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, browser
from engine_lab import FOREIGN, engine_lab, until

from testbed.capture import CaptureError
from testbed.lab import Lab
from testbed.report import report, write_report
from testbed.topology import Readiness
from testbed.topology_file import loads

pytestmark = pytest.mark.lab

REPOSITORY = Path(__file__).parents[2]
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
RULES = ("-A PREROUTING -p udp -m udp --dport 80 -j TPROXY --on-port 50080",)

NAT = """
name: translated
nodes:
  client:
  gateway:
    kind: router
    nft: |
      table ip nat {
        chain out {
          type nat hook postrouting priority srcnat
          oifname "eth1" masquerade
        }
      }
  server:
links:
  - ends: [{node: client}, {node: gateway}]
  - ends: [{node: gateway}, {node: server}]
"""


class Page(HTMLParser):
    """What a report consists of: its elements, and the text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[Path]:
    """The report of a datagram that went through the proxy on the gateway, and came back; all said is hostile."""
    with engine_lab(tmp_path, RULES, "inline", capture=True, record=True) as lab:
        words = ["sh", "-c", 'echo "$0"; exec sleep 60', HOSTILE]
        lab.gateway.start("talker", words, Readiness(log="script"))
        proxy = lab.bound(lab.gateway, socket.SOCK_DGRAM, "0.0.0.0", 50080)
        client = lab.bound(lab.client, socket.SOCK_DGRAM, "0.0.0.0")
        client.sendto(HOSTILE.encode(), (FOREIGN[4], 80))
        data, sender = proxy.recvfrom(4096)
        proxy.sendto(data, sender)
        assert client.recvfrom(4096) == (HOSTILE.encode(), (FOREIGN[4], 80))
        yield write_report(lab.lab, tmp_path / "report.html")


@pytest.fixture
def translated(tmp_path: Path) -> Path:
    """The report of a datagram whose source the gateway changed."""
    with Lab(loads(NAT), tmp_path) as lab:
        server = lab["server"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client = lab["client"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with server, client:
            server.settimeout(3)
            server.bind(("0.0.0.0", 53))
            client.sendto(b"question", (lab["server"].address(), 53))
            assert server.recv(64) == b"question"
        page = tmp_path / "report.html"
        page.write_text(report(lab, failure="the answer never came"))
        return page


def test_a_report_shows_topology_connections_decisions_and_logs_of_a_proxied_exchange(proxied: Path) -> None:
    page = Page(proxied)
    assert [node["data-node"] for node in page.all("g") if "data-node" in node] == ["client", "gateway", "server"]
    assert re.search(r"udp 10\.0\.0\.1:\d+ → 198\.51\.100\.7:80: 2 packets", page.text)
    for wanted in (
        "client:eth0",
        "gateway:eth0",
        "PREROUTING",
        "redirect",
        "TPROXY --on-port 50080",
        "gateway: talker",
    ):
        assert wanted in page.text
    assert len([panel for panel in page.all("details") if (panel.get("id") or "").startswith("packet-")]) == 2
    assert "###[ UDP ]###" in page.text
    assert "cannot be had" not in page.text


def test_a_packet_has_the_engines_decisions_with_hook_reason_and_rule(proxied: Path) -> None:
    text = proxied.read_text()
    asked, answered = re.split(r'<details id="packet-\d+">', text)[1:3]
    assert """class="note word" title="gateway's engine at PREROUTING: PREROUTING 1">redirect<""" in asked
    (decision,) = re.findall(r'<tr class="mono">(.+)</tr>', asked)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", decision)
    assert cells[:2] == ["gateway", "PREROUTING"]
    assert re.fullmatch(r"10\.0\.0\.1:\d+ → 198\.51\.100\.7:80", cells[2])
    assert re.fullmatch(r"10\.0\.0\.1:\d+ → 10\.0\.0\.2:50080", cells[3])
    assert cells[4:] == ["redirect", "PREROUTING 1"]
    assert "translated" in answered.partition("</table>")[0]


def test_the_timeline_has_programs_captures_events_and_packets_on_one_axis(proxied: Path) -> None:
    text = proxied.read_text()
    chart = text[text.index('<div class="timeline"') : text.index("0 is when the first connection began")]
    lanes = [re.sub(r"<[^>]+>", "", lane) for lane in re.findall(r'<span class="label">(.+?)</span>', chart)]
    assert lanes[:4] == ["lab ", "gateway tproxyd", "gateway talker", "gateway engine&#39;s events"]
    assert re.search(r'title="tproxyd is ready, -[\d.]+ ms"', chart)
    assert re.search(r'class="mark mapped" style="--b: [\d.]+" title="mapped #\d+ udp 10\.0\.0\.1:', chart)
    assert len(re.findall(r'href="#packet-\d+" class="mark (?:forward|back)"', chart)) == 2
    listed = Page(proxied).text
    assert re.search(r"captures are armed", listed[listed.index("The same as a list") :])


def test_what_came_over_the_wire_or_out_of_a_program_is_text_and_nothing_else(proxied: Path) -> None:
    page = Page(proxied)
    assert HOSTILE in page.text  # the log
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_a_report_needs_nothing_from_elsewhere(proxied: Path) -> None:
    page = Page(proxied)
    assert page.all("link") == []
    targets = [
        attributes[name] or "" for _, attributes in page.elements for name in ("src", "href") if name in attributes
    ]
    assert targets
    assert all(target.startswith("#") for target in targets)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {target[1:] for target in targets} <= ids


def test_what_changed_at_a_hop_is_marked_in_the_ladder_and_in_the_dissection(translated: Path) -> None:
    text = translated.read_text()
    assert '<span class="note">src 10.0.0.1→10.0.1.1</span>' in text
    assert re.search(r"<mark>\s+src\s+= 10\.0\.1\.1</mark>", text)
    assert not re.search(r"<mark>\s+(dst|len|version)\s", text)


def test_a_report_of_a_failure_begins_with_it(translated: Path) -> None:
    text = Page(translated).text
    assert text.index("the answer never came") < text.index("Who talked to whom")


def test_a_report_of_a_lab_that_has_ended_has_what_was_captured(tmp_path: Path) -> None:
    with engine_lab(tmp_path, RULES, "inline", capture=True) as lab:
        lab.open(lab.client, socket.SOCK_DGRAM).sendto(b"x", (FOREIGN[4], 81))
        assert lab.lab.capture is not None
        lab.lab.capture.wait(3, 3)
    text = Page(write_report(lab.lab, tmp_path / "report.html")).text
    assert "→ 198.51.100.7:81" in text
    assert "cannot be had" in text


def test_a_lab_without_captures_has_a_report_that_says_so(tmp_path: Path) -> None:
    with Lab(loads(NAT), tmp_path, capture=False) as lab:
        assert "nothing was captured" in report(lab)


def test_a_lab_whose_captures_could_not_be_armed_has_a_report_that_says_so(tmp_path: Path) -> None:
    setup = "setup: [ip link add made type veth peer name other]"
    other = NAT.replace("  client:\n", f"  client: {{{setup}}}\n") + 'capture: ["client:nade"]\n'
    lab = Lab(loads(other), tmp_path)
    with pytest.raises(CaptureError), lab:
        pytest.fail("it came up")
    text = report(lab, "it never came up")
    assert "the captures were never armed" in text
    assert "it never came up" in text


def test_of_a_log_the_end_is_shown_however_long_it_is(tmp_path: Path) -> None:
    with Lab(loads(NAT), tmp_path / "lab", capture=False) as lab:
        log = lab.logs["server", "endless"] = tmp_path / "endless.log"
        log.touch()
        os.truncate(log, 1 << 40)
        with log.open("ab") as end:
            end.write(b"the last words")
        text = Page(write_report(lab, tmp_path / "report.html")).text
    assert "the last words" in text


def test_of_many_frames_and_connections_the_first_and_the_last_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the 50 frames at either end some are the kernel's own, as many as it likes: of ARP, ND and MLD.
    monkeypatch.setattr("testbed.report._MOST_FRAMES", 100)
    monkeypatch.setattr("testbed.report._MOST_CONNECTIONS", 20)
    with Lab(loads("name: two\nnodes: {a: , b: }\nlinks: [{ends: [{node: a}, {node: b}]}]"), tmp_path) as lab:
        with lab["a"].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for port in range(1, 81):
                sender.sendto(b"x", ("10.0.0.2", port))
        page = Page(write_report(lab, tmp_path / "report.html"))
    summaries = [port for port in range(1, 81) if f"10.0.0.2:{port}: " in page.text]
    assert (summaries[0], summaries[-1], len(summaries)) == (1, 80, 20)
    assert "Only the first and the last 50 frames were looked at" in page.text
    assert "connections between the first and the last 10 are left out here" in page.text


def test_after_its_share_of_packets_an_engine_is_traced_no_more_and_still_tells_decisions(tmp_path: Path) -> None:
    with engine_lab(tmp_path, RULES, "inline", capture=True, record=True) as lab:
        assert lab.ask("counters")["watchers"] == 3
        sender = lab.open(lab.client, socket.SOCK_DGRAM)
        for _ in range(1100):
            sender.sendto(b"x", (FOREIGN[4], 81))
        until(lambda: lab.ask("counters")["watchers"] == 2, "the trace has ended")
        late = lab.bound(lab.client, socket.SOCK_DGRAM, "0.0.0.0", 4444)
        late.sendto(b"x", (FOREIGN[4], 80))
        until(lambda: lab.reasons("PREROUTING").get("redirect"), "the engine has seen it")
        recording = lab.lab.recording()
        assert recording.cut == {"gateway"}
        packets = [event for _, event in recording.events if event["event"] == "packet"]
        # Not the last: an ICMP error may have followed, since nobody listens where it was redirected to.
        redirected = [event for event in packets if event["reason"] == "redirect"]
        assert [event["before"]["source"]["port"] for event in redirected] == [4444]
        lab.lab.programs["gateway", "tproxyd"].kill()
        assert len(lab.lab.recording().events) >= len(recording.events)
        lab.lab.start_again("gateway", "tproxyd")
        assert lab.ask("counters")["watchers"] == 3


def test_a_program_that_ended_by_itself_is_on_the_timeline_with_its_end(tmp_path: Path) -> None:
    with engine_lab(tmp_path, RULES, "inline", capture=True, record=True) as lab:
        program = lab.gateway.start("brief", ["sh", "-c", "exec sleep 0.1"])
        assert program.wait(3) == 0
        (entry,) = [entry for entry in lab.lab.journal.entries if entry.what == "brief"]
        until(lambda: entry.ended is not None, "its end is noticed")
        assert entry.outcome == "exit status 0"


def test_testbed_run_writes_a_report_also_when_its_command_fails(tmp_path: Path) -> None:
    file, page = tmp_path / "lab.yaml", tmp_path / "lab.html"
    file.write_text("name: small\nnodes: {a: , b: }\nlinks:\n  - ends: [{node: a}, {node: b}]\n")
    words = ("run", file, "--directory", tmp_path, "--report", page, "--in", "a", "--", "bash", "-c")
    command = [sys.executable, "-m", "testbed.cli", *map(str, words), "echo x > /dev/udp/10.0.0.2/9; exit 7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 7
    assert f"report: {page}" in done.stderr
    text = Page(page).text
    assert re.search(r"udp 10\.0\.0\.1:\d+ → 10\.0\.0\.2:9: 2 packets", text)  # the other is the refusal
    assert "bash -c 'echo x > /dev/udp/10.0.0.2/9; exit 7': exit status 7" in text  # the timeline


def test_testbed_run_refuses_a_report_in_no_folder_before_it_builds_anything(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text("name: small\nnodes: {a: }\n")
    words = ("run", file, "--report", tmp_path / "nowhere" / "lab.html", "--", "touch", tmp_path / "ran")
    command = [sys.executable, "-m", "testbed.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "there is no folder" in done.stderr
    assert not (tmp_path / "ran").exists()


# ---- in a browser ----


@pytest.fixture
def screenshots(tmp_path: Path, record_property: Callable[[str, object], None]) -> Path:
    """Where pictures go: where CI finds them, and the plugin's summary names it; else where nobody has to clean up."""
    if not os.environ.get("CI"):
        return tmp_path
    folder = REPOSITORY / "artefacts" / "report-screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    record_property("lab artefacts", str(folder))  # as text: pytest-xdist sends it to the process that prints it
    return folder


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; it takes a second or two to start."""
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def is_open(looking: Browser) -> list[bool]:
    """Which packets are open."""
    found: list[bool] = looking.evaluate("[...document.querySelectorAll('.ladder > details')].map((p) => p.open)")
    return found


def stretch(looking: Browser) -> tuple[float, float]:
    """What the timeline shows: from, and how much, in milliseconds."""
    names = ("--from", "--span")
    begin, span = (
        looking.evaluate(f"document.querySelector('.timeline').style.getPropertyValue('{n}')") for n in names
    )
    return float(begin), float(span)


def test_in_a_browser_packets_open_by_click_key_and_fragment_and_nothing_hostile_runs(
    proxied: Path, screenshots: Path, looking: Browser
) -> None:
    first, second = re.findall(r'id="(packet-\d+)"', proxied.read_text())
    looking.open(proxied.as_uri())
    assert is_open(looking) == [False, False]
    looking.click(f"#{first} > summary")
    assert is_open(looking) == [True, False]
    looking.press("ArrowDown")
    assert looking.evaluate("document.activeElement.parentElement.id") == second
    looking.press("Enter")
    assert is_open(looking) == [True, True]
    for name, width, is_dark in (("wide", 1400, False), ("narrow", 420, False), ("dark", 1400, True)):
        looking.look(width, is_dark=is_dark)
        assert looking.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name}: it overflows"
        (screenshots / f"{name}.png").write_bytes(looking.picture())
    looking.press("Enter")
    assert is_open(looking) == [True, False]

    looking.open("about:blank")  # so that the page is loaded anew
    looking.open(f"{proxied.as_uri()}#{second}")
    until(lambda: is_open(looking) == [False, True], "the packet of the fragment is open")
    assert looking.evaluate("document.activeElement.parentElement.id") == second
    assert looking.evaluate("document.title") == "engine: what the lab did"
    assert looking.evaluate("document.scripts.length") == 1
    assert looking.complaints() == []


def test_on_paper_nothing_is_cut_off(proxied: Path, looking: Browser) -> None:
    looking.open(proxied.as_uri())
    looking.evaluate("document.querySelector('.ladder > details').open = true")
    looking.look(700, is_dark=False, medium="print")
    too_large = "(box) => box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1"
    cut = (
        f"[...document.querySelectorAll('.wide, .hops, .lanes, .log')].filter({too_large}).map((box) => box.innerHTML)"
    )
    assert looking.evaluate(cut) == []
    assert looking.evaluate("getComputedStyle(document.querySelector('.mark')).printColorAdjust") == "exact"
    looking.look(1400, is_dark=False)


def test_in_a_browser_the_timeline_zooms_by_button_and_key(proxied: Path, looking: Browser) -> None:
    looking.open(proxied.as_uri())
    begin, span = stretch(looking)
    assert begin < 0  # the lab, before the first packet
    numbers = "[...document.querySelectorAll('.tick')].map((tick) => tick.textContent)"
    assert "0" in looking.evaluate(numbers)
    strip = "document.querySelector('.axis .strip').getBoundingClientRect()"
    inside = f"t.getBoundingClientRect().left >= {strip}.left && t.getBoundingClientRect().right <= {strip}.right"
    for _ in range(4):
        assert looking.evaluate(f"[...document.querySelectorAll('.tick')].every((t) => {inside})")
        looking.click("[data-do=left]")
        looking.click("[data-do=in]")
    looking.click("[data-do=everything]")
    looking.click("[data-do=in]")
    assert stretch(looking)[1] == pytest.approx(span / 2)
    looking.evaluate("document.querySelector('.timeline').focus()")
    looking.press("0")
    assert stretch(looking) == pytest.approx((begin, span))
    looking.click("[data-do=traffic]")
    begin, span = stretch(looking)
    assert begin <= 0
    assert begin + span > 0
    packet = looking.evaluate("document.querySelector('.mark.forward').getAttribute('href')")
    looking.click(".mark.forward")
    assert looking.evaluate("location.hash") == packet
    until(lambda: True in is_open(looking), "the packet is open")  # the page is told of its fragment later
    assert looking.complaints() == []
