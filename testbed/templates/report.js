"use strict";
// ---- packets ----
// A fragment such as #packet-12 opens that packet; an opened packet becomes the fragment, so that it can be sent around.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView({ block: "center" });
    target.querySelector("summary").focus({ preventScroll: true });
  }
}
addEventListener("hashchange", openTarget);
for (const packet of document.querySelectorAll(".ladder > details")) {
  packet.addEventListener("toggle", () => {
    if (packet.open) history.replaceState(null, "", "#" + packet.id);
  });
}
// Up and down go from packet to packet.
addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const packets = [...document.querySelectorAll(".ladder > details > summary")];
  const next = packets[packets.indexOf(document.activeElement) + step];
  if (step && next && packets.includes(document.activeElement)) {
    event.preventDefault();
    next.focus();
  }
});
// Not before: going to the fragment, the browser takes the focus away.
addEventListener("load", openTarget);

// ---- the timeline ----
// Everything on it knows its own time; which stretch is to be seen are two numbers in the style of the whole.
const chart = document.querySelector(".timeline");
const axis = chart.querySelector(".axis .strip");
const whole = { from: Number(chart.dataset.begin), to: Number(chart.dataset.end) };
const least = 0.01; // ms
let seen = whole;

function look(from, to) {
  const span = Math.min(Math.max(to - from, least), whole.to - whole.from);
  const begin = Math.min(Math.max(from, whole.from), whole.to - span);
  seen = { from: begin, to: begin + span };
  chart.style.setProperty("--from", begin);
  chart.style.setProperty("--span", span);
  const step = niceStep(span / Math.max(axis.clientWidth / 90, 2));
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  const numbers = [];
  const edge = (span * 20) / Math.max(axis.clientWidth, 60); // half of a number's width: none is cut off
  for (let tick = Math.ceil((begin + edge) / step); tick * step <= seen.to - edge; tick++) {
    const number = document.createElement("span");
    number.className = "tick";
    number.style.setProperty("--b", tick * step);
    number.textContent = (tick * step).toFixed(digits).replace("-", "−");
    numbers.push(number);
  }
  axis.replaceChildren(...numbers);
  chart.querySelector("[aria-live]").textContent = `${begin.toFixed(2)} to ${seen.to.toFixed(2)} ms`.replaceAll("-", "−");
}
// 1, 2 or 5 of a power of ten.
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least * 0.999);
}
function zoom(factor) {
  const middle = (seen.from + seen.to) / 2, half = ((seen.to - seen.from) * factor) / 2;
  look(middle - half, middle + half);
}
function move(part) {
  const way = (seen.to - seen.from) * part;
  look(seen.from + way, seen.to + way);
}
const doing = {
  everything: () => look(whole.from, whole.to),
  traffic: () => {
    const [from, to] = chart.dataset.traffic.split(" ").map(Number);
    look(from - (to - from) * 0.02, to + (to - from) * 0.02);
  },
  in: () => zoom(1 / 2), out: () => zoom(2), left: () => move(-1 / 4), right: () => move(1 / 4),
};
for (const button of chart.querySelectorAll("button")) button.addEventListener("click", doing[button.dataset.do]);
chart.addEventListener("keydown", (event) => {
  const wanted = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "everything" }[event.key];
  if (event.target === chart && wanted && !event.ctrlKey && !event.altKey && !event.metaKey) {
    event.preventDefault();
    doing[wanted]();
  }
});
addEventListener("resize", () => look(seen.from, seen.to));
look(whole.from, whole.to);

// Dragging over a stretch shows it.
const lanes = chart.querySelector(".lanes");
let drag = null;
function timeAt(event) {
  const box = axis.getBoundingClientRect();
  return seen.from + ((event.clientX - box.left) / box.width) * (seen.to - seen.from);
}
lanes.addEventListener("pointerdown", (event) => {
  if (event.button === 0 && event.pointerType === "mouse" && event.clientX > axis.getBoundingClientRect().left) {
    drag = { x: event.clientX, at: timeAt(event), shade: null };
  }
});
addEventListener("pointermove", (event) => {
  if (drag === null || (drag.shade === null && Math.abs(event.clientX - drag.x) < 5)) return;
  if (drag.shade === null) {
    drag.shade = document.createElement("div");
    drag.shade.className = "shade";
    lanes.append(drag.shade);
    lanes.setPointerCapture(event.pointerId); // and no link is followed at the end
  }
  const left = lanes.getBoundingClientRect().left;
  drag.shade.style.left = `${Math.min(event.clientX, drag.x) - left}px`;
  drag.shade.style.width = `${Math.abs(event.clientX - drag.x)}px`;
});
addEventListener("pointerup", (event) => {
  if (drag !== null && drag.shade !== null) {
    const ends = [drag.at, timeAt(event)].sort((a, b) => a - b);
    drag.shade.remove();
    look(...ends);
  }
  drag = null;
});
lanes.addEventListener("dragstart", (event) => event.preventDefault());
lanes.addEventListener("dblclick", doing.everything);
