// The settings panel: those of the chosen profile, or of the shown chat alone.

import { byId, icon } from "./dom.js";
import { PROFILES, changeProfile, ownSettings, parseTools, profileName, resetProfile, settingsOf } from "./profiles.js";
import { apiKey, setApiKey } from "./storage.js";

const SLIDERS = { temperature: "temperature", "top-p": "topP" }; // id -> setting

/** Wires up the panel. `actions`: {current(), keep(settings or null) of the shown chat, keyChanged()}. */
export function setupSettings(actions) {
  const own = byId("own-settings");
  const dialog = byId("settings");
  byId("settings-open").append(icon("sliders"));
  byId("settings-close").append(icon("close"));
  const fill = () => {
    const settings = settingsOf(actions.current());
    own.checked = Boolean(actions.current().settings);
    byId("settings-title").textContent = own.checked ? "Settings for this chat" : `Settings for ${PROFILES[profileName()]}`;
    byId("system").value = String(settings.system);
    for (const [id, name] of Object.entries(SLIDERS)) {
      byId(id).value = settings[name] ?? 1;
      showValue(id, settings[name]);
    }
    byId("max-tokens").value = settings.maxTokens ?? "";
    byId("tools").value = settings.tools;
    checkTools();
    byId("key").value = apiKey();
  };
  const change = (fields) => {
    if (own.checked) actions.keep({ ...actions.current().settings, ...fields });
    else changeProfile(fields);
  };
  own.addEventListener("change", () => {
    actions.keep(own.checked ? ownSettings() : null);
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
  for (const [id, name] of Object.entries(SLIDERS))
    byId(id).addEventListener("input", (event) => {
      change({ [name]: Number(event.target.value) });
      showValue(id, Number(event.target.value));
    });
  byId("max-tokens").addEventListener("input", (event) => {
    const value = event.target.valueAsNumber;
    change({ maxTokens: event.target.checkValidity() && !Number.isNaN(value) ? value : null });
  });
  byId("tools").addEventListener("input", (event) => {
    change({ tools: event.target.value });
    checkTools();
  });
  byId("settings-reset").addEventListener("click", () => {
    if (own.checked) actions.keep(null);
    else resetProfile();
    fill();
  });
}

/** Shows the key field in the panel, for servers that require a key. */
export function offerKey() {
  byId("key-field").hidden = false;
}

function showValue(id, value) {
  byId(`${id}-value`).textContent = value?.toFixed(id === "top-p" ? 2 : 1) ?? "Server default";
}

function checkTools() {
  const { error } = parseTools(byId("tools").value);
  byId("tools").setAttribute("aria-invalid", Boolean(error));
  byId("tools-error").textContent = error ? `Not sent: ${error}` : "";
}
