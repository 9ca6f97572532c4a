// The settings panel, the theme button and the model's name.

import { isDark, systemDark } from "./colours.js";
import { byId, h, icon } from "./dom.js";
import { apiKey, load, save, setApiKey } from "./storage.js";

const DEFAULTS = { system: "", temperature: null, maxTokens: null };

let settings = { ...DEFAULTS, ...load("settings", {}) };

/** The settings of a conversation: its own, or those of all chats. */
function settingsOf(conversation) {
  return conversation.settings ? { ...DEFAULTS, ...conversation.settings } : settings;
}

/** The system prompt of a conversation. */
export function systemPrompt(conversation) {
  return String(settingsOf(conversation).system);
}

/** Request fields of a conversation's settings; unset ones are left to the server. */
export function sampling(conversation) {
  const { temperature, maxTokens } = settingsOf(conversation);
  const fields = {};
  if (temperature !== null) fields.temperature = temperature;
  if (maxTokens !== null) fields.max_tokens = maxTokens;
  return fields;
}

/** Wires up the panel. `actions`: {current(), keep(settings or null) of the shown chat, keyChanged()}. */
export function setupSettings(actions) {
  const own = byId("own-settings");
  const dialog = byId("settings");
  byId("settings-open").append(icon("sliders"));
  byId("settings-close").append(icon("close"));
  const showTemperature = (value) =>
    (byId("temperature-value").textContent = value?.toFixed(1) ?? "Server default");
  const fill = () => {
    const { system, temperature, maxTokens } = settingsOf(actions.current());
    own.checked = Boolean(actions.current().settings);
    byId("system").value = system;
    byId("temperature").value = temperature ?? 1;
    showTemperature(temperature);
    byId("max-tokens").value = maxTokens ?? "";
    byId("key").value = apiKey();
  };
  const change = (fields) => {
    const changed = { ...settingsOf(actions.current()), ...fields };
    if (own.checked) actions.keep(changed);
    else save("settings", (settings = changed));
    showTemperature(changed.temperature);
  };
  own.addEventListener("change", () => {
    actions.keep(own.checked ? { ...settings } : null);
    fill();
  });
  byId("settings-open").addEventListener("click", () => {
    fill();
    dialog.showModal();
  });
  // A click on the backdrop has the dialog itself as its target.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    const key = byId("key").value.trim();
    if (key === apiKey()) return;
    setApiKey(key);
    actions.keyChanged();
  });
  byId("system").addEventListener("input", (event) => change({ system: event.target.value }));
  byId("temperature").addEventListener("input", (event) => change({ temperature: Number(event.target.value) }));
  byId("max-tokens").addEventListener("input", (event) => {
    const value = event.target.valueAsNumber;
    change({ maxTokens: event.target.checkValidity() && !Number.isNaN(value) ? value : null });
  });
  byId("settings-reset").addEventListener("click", () => {
    change(DEFAULTS);
    fill();
  });
  setupTheme();
}

/** Shows the key field in the panel, for servers that require a key. */
export function offerKey() {
  byId("key-field").hidden = false;
}

function setupTheme() {
  const button = byId("theme");
  const draw = () => {
    const theme = load("theme", null);
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    const label = isDark() ? "Switch to light colours" : "Switch to dark colours";
    button.setAttribute("aria-label", label);
    button.title = label;
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
    document.dispatchEvent(new Event("colours"));
  };
  button.addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    // Choosing the system's own theme means to follow the system again.
    save("theme", next === (systemDark.matches ? "dark" : "light") ? null : next);
    draw();
  });
  systemDark.addEventListener("change", draw);
  draw();
}

/** Shows the model name, or a menu of several. Returns a function that returns the chosen name. */
export function showModels(names) {
  const place = byId("model");
  const address = (name) => (byId("prompt").placeholder = `Message ${name}`);
  if (names.length < 2) {
    address(names[0] ?? "the model");
    place.replaceChildren(h("span", {}, names[0] ?? ""));
    return () => names[0];
  }
  const choose = () => {
    save("model", select.value);
    address(select.value);
  };
  const select = h(
    "select",
    { "aria-label": "Model", onchange: choose },
    ...names.map((name) => h("option", { value: name }, name)),
  );
  const saved = load("model", names[0]);
  select.value = names.includes(saved) ? saved : names[0];
  address(select.value);
  place.replaceChildren(select);
  return () => select.value;
}
