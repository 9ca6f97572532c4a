// Values in the browser's storage, as JSON under "dsv4." names.

const PREFIX = "dsv4.";

/** Stored value of `name`; `fallback` if it is missing or damaged, or storage is blocked. */
export function load(name, fallback) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Stores `value`; null removes it. False if the browser refuses (storage full or blocked). */
export function save(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Calls `changed(name, isRemoved)` after another tab has stored or removed a value; "" if it has removed all. */
export function watch(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key === null || key.startsWith(PREFIX)) changed((key ?? PREFIX).slice(PREFIX.length), newValue === null);
  });
}

let memoryKey = "";

/** The API key, kept in this tab's sessionStorage, never in localStorage. */
export function apiKey() {
  try {
    return sessionStorage.getItem(PREFIX + "key") ?? memoryKey;
  } catch {
    return memoryKey;
  }
}

export function setApiKey(key) {
  memoryKey = key;
  try {
    if (key) sessionStorage.setItem(PREFIX + "key", key);
    else sessionStorage.removeItem(PREFIX + "key");
  } catch {
    // Storage is blocked: the key is lost with the page.
  }
}
