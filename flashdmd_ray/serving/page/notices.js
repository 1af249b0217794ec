// What the page says: one alert, one quiet status line, and the countdown after a rate limit.

import { element, find } from "./dom.js";

let timer = null;

export function status(text) {
  find("status").textContent = text;
}

export function clearAlert() {
  clearInterval(timer);
  timer = null;
  find("alert").hidden = true;
}

export function alert(text, title = "") {
  clearAlert();
  const parts = title ? [element("strong", {}, title), ` ${text}`] : [text];
  find("alert").replaceChildren(...parts);
  find("alert").hidden = false;
}

// Counts down beside the message; `blocked(true)` until it is over. Screen readers hear the message once, not every second.
export function alertFor(seconds, text, title, blocked) {
  alert(text, title);
  const end = Date.now() + 1000 * seconds;
  const clock = element("span", { className: "countdown", ariaHidden: "true" });
  find("alert").prepend(clock);
  const tick = () => {
    const left = Math.ceil((end - Date.now()) / 1000);
    clock.textContent = `${left} s`;
    if (left > 0) return;
    clearAlert();
    blocked(false);
    status("You can draw again.");
  };
  blocked(true);
  tick();
  timer = setInterval(tick, 250);
}
