// One result on the stage: the student's images, the teacher's beside them, and how long each took.

import { element } from "./dom.js";

export const secondsText = (seconds) => `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;

const dataUrl = (image, format) => `data:image/${format};base64,${image.b64_json}`;

export const firstImage = (drawing) => dataUrl(drawing.data[0], drawing.output_format ?? "png");

function picture(image, drawing, prompt, number) {
  const seed = image.seed;
  const source = dataUrl(image, drawing.output_format ?? "png");
  const shown = element("img", { src: source, alt: `${prompt} (image ${number + 1})`, draggable: false });
  const save = element("a", { href: source, download: `flashdmd-${drawing.model}-${seed}.png`.replaceAll(":", "-") }, "Save");
  save.setAttribute("aria-label", `Save image ${number + 1}`);
  return element("figure", {}, shown, element("figcaption", {}, element("span", {}, `seed ${seed}`), save));
}

export function stepsText(model, steps) {
  const forwards = model.guidance_scale > 1 ? `, ${2 * steps} forwards` : "";
  return `${steps} step${steps === 1 ? "" : "s"}${forwards}`;
}

function side(title, drawing, model, prompt, bar) {
  const heading = element("h3", {}, title, element("small", {}, stepsText(model, drawing.num_inference_steps)));
  const images = element("div", { className: "images" }, ...drawing.data.map((image, i) => picture(image, drawing, prompt, i)));
  images.dataset.count = String(drawing.data.length);
  return element("section", { className: `side ${model.kind}` }, heading, images, timeLine(drawing, bar));
}

function timeLine(drawing, bar) {
  const inside = drawing.timing ? ` (${secondsText(drawing.timing.draw_seconds)} drawing)` : "";
  const time = element("p", { className: "time" }, element("strong", {}, secondsText(drawing.seconds)), element("small", {}, inside));
  const track = element("div", { className: "bar" }, element("div", {}));
  track.firstChild.style.setProperty("--share", String(bar));
  return element("div", {}, time, track);
}

function waiting(title, model, steps, count) {
  const blank = () => element("figure", { className: "blank" }, element("div", {}), element("figcaption", {}, "\u00a0"));
  const blanks = Array.from({ length: count }, blank);
  const images = element("div", { className: "images" }, ...blanks);
  images.dataset.count = String(count);
  const clock = element("p", { className: "time" }, element("strong", { className: "clock" }, secondsText(0)));
  const heading = element("h3", {}, title, element("small", {}, stepsText(model, steps)));
  return element("section", { className: `side ${model.kind} waiting` }, heading, images, clock);
}

function ratio(entry) {
  const factor = entry.teacher.seconds / entry.student.seconds;
  const text = factor >= 1 ? `${factor.toFixed(1)}× faster than its teacher` : `${(1 / factor).toFixed(1)}× slower than its teacher`;
  return element("p", { className: "ratio" }, element("strong", {}, text), " with the same prompt and seed");
}

// pending: "student" | "teacher" | null, what is being drawn
export function render(entry, pending, actions) {
  const { request, models, student, teacher } = entry;
  const longest = Math.max(student?.seconds ?? 0, teacher?.seconds ?? 0) || 1;
  const sides = [];
  if (student) sides.push(side("Student", student, models.student, request.prompt, student.seconds / longest));
  else sides.push(waiting("Student", models.student, request.num_inference_steps, request.n));
  if (teacher) sides.push(side("Teacher", teacher, models.teacher, request.prompt, teacher.seconds / longest));
  else if (pending === "teacher") sides.push(waiting("Teacher", models.teacher, models.teacher.default_num_inference_steps, request.n));
  if (models.student.kind === "teacher") sides[0].querySelector("h3").firstChild.textContent = "Teacher";
  const duel = element("div", { className: `duel sides-${sides.length}` }, ...sides);
  const parts = [element("h2", { className: "shown-prompt" }, request.prompt), duel];
  if (student && teacher) parts.push(ratio(entry));
  if (!pending) parts.push(element("div", { className: "actions" }, ...actions));
  return element("article", { className: "card result" }, ...parts);
}
