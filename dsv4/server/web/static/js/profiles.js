// Profiles: named settings of how the model answers. A chat keeps the profile that it was last asked with, and may have
// settings of its own, which come before the profile's.
//
// settings  {system, temperature, topP, maxTokens, tools}; null: the server's default; tools: JSON text
// profile   settings, and {model, thinking, effort}

import { load, save, watch } from "./storage.js";

export const PROFILES = { instant: "Instant", expert: "Expert" };
/** True for the key of a profile. */
export const isProfile = (name) => Object.hasOwn(PROFILES, name);
const SETTINGS = { system: "", temperature: null, topP: null, maxTokens: null, tools: "" };
const DEFAULTS = {
  instant: { model: null, thinking: false, effort: "high", ...SETTINGS },
  expert: { model: null, thinking: true, effort: "high", ...SETTINGS },
};

const remembered = load("profile", "expert");
let chosen = isProfile(remembered) ? remembered : "expert";

/** Key of the chosen profile. */
export function profileName() {
  return chosen;
}

/** The chosen profile. */
export function profile() {
  return { ...DEFAULTS[chosen], ...load(`profile.${chosen}`, {}) };
}

/** Chooses a profile; a "profile" event on the document tells the page. An unknown name changes nothing. */
export function chooseProfile(name) {
  if (!isProfile(name) || name === chosen) return;
  save("profile", (chosen = name));
  tell();
}

const tell = () => document.dispatchEvent(new Event("profile"));
// Requests read the profiles as they are stored: what another tab has changed is shown here too.
watch((name) => name.startsWith("profile") && tell());

/** Stores changed fields of the chosen profile. */
export function changeProfile(fields) {
  save(`profile.${chosen}`, { ...load(`profile.${chosen}`, {}), ...fields });
}

/** Returns the chosen profile's settings (all but model, thinking and effort) to their defaults. */
export function resetProfile() {
  changeProfile(SETTINGS);
}

/** Settings of a conversation: its own, or those of the chosen profile. */
export function settingsOf(conversation) {
  const settings = { ...profile(), ...conversation.settings };
  return { ...settings, system: String(settings.system), tools: String(settings.tools) };
}

/** What a conversation begins with when it gets settings of its own. */
export function ownSettings() {
  const { system, temperature, topP, maxTokens, tools } = profile();
  return { system, temperature, topP, maxTokens, tools };
}

/** The settings of a file that have the type they have here: text, or a number or null. */
export function checkedSettings(settings) {
  const isNumber = (value) => value === null || Number.isFinite(value);
  const isRight = ([name, ours]) => (ours === null ? isNumber(settings[name]) : typeof settings[name] === "string");
  const right = Object.entries(SETTINGS).filter(isRight);
  return Object.fromEntries(right.map(([name]) => [name, settings[name]]));
}

/** Request fields of the thinking switches. */
export function thinkingFields() {
  const { thinking, effort } = profile();
  if (!thinking) return { thinking: { type: "disabled" } };
  return { thinking: { type: "enabled" }, reasoning_effort: effort };
}

/** Request fields of a conversation's settings; unset ones are left to the server. */
export function settingsFields(conversation) {
  const { temperature, topP, maxTokens, tools } = settingsOf(conversation);
  const fields = { temperature, top_p: topP, max_tokens: maxTokens, tools: parseTools(tools).tools };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

/** {tools, error} of a JSON text: a list of functions for the request, null for none. */
export function parseTools(text) {
  if (!String(text).trim()) return { tools: null, error: "" };
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    return { tools: null, error: error.message };
  }
  if (!Array.isArray(list)) list = [list];
  const tools = list.map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
  const at = tools.findIndex((tool) => typeof tool.function?.name !== "string");
  if (at >= 0) return { tools: null, error: `Tool ${at + 1} has no name.` };
  return { tools: tools.length ? tools : null, error: "" };
}

/** Wires up the switch of the profiles. */
export function setupProfiles(place) {
  const draw = () => {
    for (const input of place.querySelectorAll("input")) input.checked = input.value === chosen;
  };
  place.addEventListener("change", (event) => chooseProfile(event.target.value));
  document.addEventListener("profile", draw);
  draw();
}
