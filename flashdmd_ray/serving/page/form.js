// The settings: what a model offers becomes controls, and controls become a request.

import { element, find } from "./dom.js";

const OFFERED_STEPS = [1, 2, 4, 8];
const LARGEST_SEED = 2 ** 32; // exact in JavaScript and accepted by the server
const TEACHER = ":teacher";

// For a model whose export names no prompts of its own.
const PICTURES = [
  "a lighthouse on a cliff at dusk, oil painting",
  "a red fox in fresh snow, photograph",
  "a cup of coffee beside a window on a rainy day",
];

let models = [];

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

export const modelNamed = (name) => models.find((model) => model.id === name);

export const teacherOf = (model) => models.find((other) => other.id === model.id + TEACHER) ?? null;

export const selected = () => modelNamed(find("model").value);

export function showModels(found) {
  models = found;
  const before = find("model").value;
  find("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  if (modelNamed(before)) find("model").value = before;
  find("model-field").hidden = models.length < 2;
  showSelected();
}

export function showSelected() {
  const model = selected();
  const size = find("size").value;
  find("size").replaceChildren(...model.sizes.map((text) => new Option(text.replace("x", " × "), text)));
  if (model.sizes.includes(size)) find("size").value = size;
  showSteps(model);
  find("teacher-field").hidden = teacherOf(model) === null;
  showExamples(model.examples.length ? model.examples : PICTURES);
  find("base").textContent = `It draws what its teacher draws: ${model.base}.`;
}

function showSteps(model) {
  const offered = model.num_inference_steps;
  const shown = model.kind === "student" ? offered.filter((steps) => OFFERED_STEPS.includes(steps)) : offered;
  const before = steps();
  const chosen = shown.includes(before) ? before : model.default_num_inference_steps;
  const choices = shown.map((number) => {
    const radio = element("input", { type: "radio", name: "steps", value: String(number), checked: number === chosen });
    return element("label", {}, radio, element("span", {}, String(number)));
  });
  find("steps").replaceChildren(...choices);
}

function showExamples(prompts) {
  const chips = prompts.map((prompt) => {
    const chip = element("button", { type: "button", title: prompt }, prompt);
    chip.addEventListener("click", () => {
      find("prompt").value = prompt;
      find("prompt").focus();
    });
    return chip;
  });
  find("examples").replaceChildren(...chips);
}

const steps = () => Number(document.querySelector("input[name=steps]:checked")?.value);

export const isLocked = () => find("lock").getAttribute("aria-pressed") === "true";

export function lock(locked) {
  find("lock").setAttribute("aria-pressed", String(locked));
  find("lock").querySelector("span").textContent = locked ? "Locked" : "Lock";
}

export function changeCount(by) {
  find("n").value = String(Math.min(10, Math.max(1, (Number(find("n").value) || 1) + by)));
}

// {problem, field} or {request}
export function read() {
  const prompt = find("prompt").value.trim();
  if (!prompt) return { field: "prompt", problem: "Write what to draw, or choose an example." };
  const n = Number(find("n").value);
  if (!Number.isInteger(n) || n < 1 || n > 10) return { field: "n", problem: "Between 1 and 10 images can be drawn at once." };
  const seed = Number(find("seed").value);
  if (find("seed").value === "" || !Number.isInteger(seed) || seed < 0 || seed >= LARGEST_SEED)
    return { field: "seed", problem: `A seed is a whole number from 0 to ${LARGEST_SEED - 1}.` };
  const size = find("size").value;
  return { request: { model: selected().id, prompt, n, size, seed, num_inference_steps: steps() } };
}

export function restore(request) {
  if (modelNamed(request.model)) {
    find("model").value = request.model;
    showSelected();
  }
  find("prompt").value = request.prompt;
  find("n").value = String(request.n);
  find("seed").value = String(request.seed);
  find("size").value = request.size;
  const radio = document.querySelector(`input[name=steps][value="${request.num_inference_steps}"]`);
  if (radio) radio.checked = true;
}

const FIELDS = { prompt: "prompt", n: "n", seed: "seed", size: "size", model: "model", num_inference_steps: "steps" };

// Mark the field that the server, or `read`, found wrong, and take the keyboard there.
export function blame(param) {
  const place = find(FIELDS[param]);
  if (!place) return;
  const field = place.id === "steps" ? place.querySelector("input:checked") : place;
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
}

export function forgive() {
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}
