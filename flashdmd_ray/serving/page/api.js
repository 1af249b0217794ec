// Requests to the API this page came from, and its errors as exceptions.

const KEY = "flashdmd-api-key"; // in sessionStorage: this tab, until it is closed

export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message ?? `The server answered ${status}.`);
    this.status = status;
    this.param = error.param ?? null; // the field that is wrong
    this.retryAfter = retryAfter; // seconds, or null
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function call(path, { body, signal } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const request = { headers, signal, cache: "no-store" };
  if (body) {
    request.method = "POST";
    request.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached. Is it running?" }, null);
  }
  if (response.ok) return response.json();
  throw await errorOf(response);
}

async function errorOf(response) {
  const text = await response.text();
  let error;
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    error = { message: text.slice(0, 300) || undefined };
  }
  const wait = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(response.status, error, Number.isFinite(wait) ? Math.max(1, Math.ceil(wait)) : null);
}

export async function models() {
  return (await call("v1/models")).data;
}

// The answer with `seconds`: from sending the request to having the images, as this page saw it.
export async function requestImages(body, signal) {
  const start = performance.now();
  const answer = await call("v1/images/generations", { body, signal });
  return { ...answer, seconds: (performance.now() - start) / 1000 };
}
