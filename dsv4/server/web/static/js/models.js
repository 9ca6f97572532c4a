// The model's name, or a menu of several. Each profile has a model of its own.

import { byId, h } from "./dom.js";
import { changeProfile, profile, profileName } from "./profiles.js";

const HINTS = { instant: /flash/i, expert: /pro/i }; // names of models that a profile begins with

let names = [];

/** The chosen profile's model; undefined before the models are listed. */
export function chosenModel() {
  const { model } = profile();
  if (names.includes(model)) return model;
  return names.find((name) => HINTS[profileName()].test(name)) ?? names[0];
}

/** Shows the listed models. */
export function showModels(listed) {
  names = listed;
  draw();
}

/** `changed` is called after another model is chosen, by the menu or with a profile. */
export function setupModels(changed) {
  document.addEventListener("profile", () => {
    draw();
    changed();
  });
  byId("model").addEventListener("change", (event) => {
    changeProfile({ model: event.target.value });
    address();
    changed();
  });
}

function address() {
  byId("prompt").placeholder = `Message ${chosenModel() ?? "the model"}`;
}

function draw() {
  address();
  const options = names.map((name) => h("option", { value: name, selected: name === chosenModel() }, name));
  const shown = names.length < 2 ? h("span", {}, names[0] ?? "") : h("select", { "aria-label": "Model" }, ...options);
  byId("model").replaceChildren(shown);
}
