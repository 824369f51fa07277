"use strict";
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
