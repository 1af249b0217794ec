// The page: draw, compare with the teacher, remember what was drawn in this session.

import { ApiError, key, models, requestImages } from "./api.js";
import { button, element, find } from "./dom.js";
import * as form from "./form.js";
import * as notices from "./notices.js";
import { firstImage, render, secondsText } from "./result.js";
import { curl, python } from "./snippets.js";
import { followTheme } from "./theme.js";

const REMEMBERED = 40; // entries; the images are in this tab's memory

const state = { history: [], shown: null, abort: null, blocked: false };

// entry: {request, models: {student, teacher}, student, teacher}, the last two being answers of the API or null.
function showEntry(entry, pending = null) {
  state.shown = entry;
  find("empty").hidden = true;
  find("result").replaceChildren(render(entry, pending, actionsOf(entry)));
}

function actionsOf(entry) {
  const actions = [button("Copy as code", () => showCode(entry.request))];
  if (entry.models.teacher && !entry.teacher) actions.unshift(button("Compare with the teacher", () => busyWith(() => compare(entry)), "primary"));
  return actions;
}

// One thing at a time, so that no drawing slows down another one's seconds.
async function busyWith(work) {
  if (state.abort || state.blocked) return;
  notices.clearAlert();
  form.forgive();
  state.abort = new AbortController();
  find("cancel").hidden = false;
  find("generate").disabled = true;
  document.body.classList.add("busy");
  const clock = startClock();
  try {
    await work();
  } catch (error) {
    explain(error);
  } finally {
    clearInterval(clock);
    state.abort = null;
    find("cancel").hidden = true;
    find("generate").disabled = state.blocked;
    document.body.classList.remove("busy");
    if (state.shown) showEntry(state.shown);
  }
}

function startClock() {
  let start = performance.now();
  let watched = null;
  return setInterval(() => {
    const clock = document.querySelector(".clock");
    if (clock && clock !== watched) [watched, start] = [clock, performance.now()];
    if (clock) clock.textContent = secondsText((performance.now() - start) / 1000);
  }, 50);
}

async function generate() {
  if (state.abort || state.blocked || !form.selected()) return;
  if (!form.isLocked()) find("seed").value = String(form.randomSeed());
  const { request, problem, field } = form.read();
  if (problem) return refuse(problem, field);
  const models = { student: form.selected(), teacher: form.teacherOf(form.selected()) };
  const withTeacher = find("with-teacher").checked && models.teacher !== null;
  await busyWith(async () => {
    const before = state.shown;
    const entry = { request, models, student: null, teacher: null };
    notices.status("Drawing…");
    showEntry(entry, "student");
    showResult();
    try {
      entry.student = await requestImages(request, state.abort.signal);
    } catch (error) {
      takeBack(before);
      throw error;
    }
    remember(entry);
    const count = request.n === 1 ? "1 image" : `${request.n} images`;
    notices.status(`${count} in ${secondsText(entry.student.seconds)}.`);
    if (withTeacher) await compare(entry);
  });
}

// In one column the result is below the form.
function showResult() {
  if (matchMedia("(max-width: 56rem)").matches) find("result").scrollIntoView({ block: "start", behavior: "smooth" });
}

function takeBack(before) {
  state.shown = before;
  if (before) return;
  find("result").replaceChildren();
  find("empty").hidden = false;
}

async function compare(entry) {
  const { teacher } = entry.models;
  notices.status("The teacher is drawing…");
  showEntry(entry, "teacher");
  const request = { ...entry.request, model: teacher.id, num_inference_steps: teacher.default_num_inference_steps };
  entry.teacher = await requestImages(request, state.abort.signal);
  const [student, its] = [entry.student.seconds, entry.teacher.seconds].map(secondsText);
  notices.status(`Student ${student}, teacher ${its}: ${(entry.teacher.seconds / entry.student.seconds).toFixed(1)} times as long.`);
  showHistory();
}

function refuse(problem, field) {
  notices.alert(problem);
  form.blame(field);
}

function explain(error) {
  if (error.name === "AbortError") return notices.status("Cancelled.");
  notices.status("");
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) return askForKey(key.get() ? "This key is not known here." : "");
  if (error.status === 429) {
    return notices.alertFor(error.retryAfter ?? 5, error.message, "Too many requests.", (blocked) => {
      state.blocked = blocked;
      find("generate").disabled = blocked;
    });
  }
  notices.alert(error.message, [500, 504].includes(error.status) ? "The server could not draw this." : "");
  if (error.param) form.blame(error.param);
}

function askForKey(problem) {
  key.set("");
  find("key-field").hidden = false;
  if (problem) notices.alert(problem);
  else notices.status("This server asks for an API key.");
  find("key").focus();
}

async function useKey() {
  key.set(find("key").value.trim());
  find("key").value = "";
  await load();
}

async function load() {
  try {
    form.showModels(await models());
  } catch (error) {
    find("generate").disabled = true;
    explain(error);
    if (error.status === 503 || error.status === 0) setTimeout(load, 3000);
    return;
  }
  find("key-field").hidden = true;
  find("generate").disabled = state.blocked;
  notices.clearAlert();
  notices.status("");
  if (!find("prompt").value) find("prompt").value = find("examples").firstChild.textContent;
  if (!find("seed").value) find("seed").value = String(form.randomSeed());
  find("prompt").focus({ preventScroll: true });
}

function remember(entry) {
  state.history.unshift(entry);
  state.history.length = Math.min(state.history.length, REMEMBERED);
  showHistory();
}

function showHistory() {
  find("history-section").hidden = state.history.length === 0;
  const items = state.history.map((entry) => {
    const { prompt, num_inference_steps: steps, seed } = entry.request;
    const image = element("img", { src: firstImage(entry.student), alt: "" });
    const made = button("", () => recall(entry));
    made.append(image);
    made.title = `${prompt} — ${steps} steps, seed ${seed}`;
    made.setAttribute("aria-label", `${prompt}, ${steps} steps, seed ${seed}: show and restore the settings`);
    return element("li", {}, made);
  });
  find("history").replaceChildren(...items);
}

function recall(entry) {
  if (state.abort) return;
  form.restore(entry.request);
  showEntry(entry);
  notices.status("Settings restored.");
  showResult();
}

function showCode(request) {
  const show = () => {
    const language = document.querySelector("input[name=language]:checked").value;
    find("code-text").textContent = (language === "curl" ? curl : python)(request, key.get() !== "");
    find("copied").textContent = "";
  };
  for (const radio of document.querySelectorAll("input[name=language]")) radio.onchange = show;
  show();
  find("code").showModal();
}

// Without TLS browsers give no clipboard: then the text is selected, for Ctrl+C.
async function copy() {
  try {
    await navigator.clipboard.writeText(find("code-text").textContent);
    find("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(find("code-text"));
    find("copied").textContent = "Selected: press Ctrl+C.";
  }
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!find("code").open) generate();
  } else if (event.key === "Escape" && state.abort) state.abort.abort();
}

function wire() {
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  document.addEventListener("keydown", onKey);
  find("cancel").addEventListener("click", () => state.abort?.abort());
  find("model").addEventListener("change", form.showSelected);
  find("shuffle").addEventListener("click", () => (find("seed").value = String(form.randomSeed())));
  find("lock").addEventListener("click", () => form.lock(!form.isLocked()));
  find("n-less").addEventListener("click", () => form.changeCount(-1));
  find("n-more").addEventListener("click", () => form.changeCount(1));
  find("key-use").addEventListener("click", useKey);
  find("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    useKey();
  });
  find("copy").addEventListener("click", copy);
  find("clear").addEventListener("click", () => {
    state.history = [];
    showHistory();
    find("prompt").focus();
  });
}

followTheme(find("theme"));
wire();
load();
