// The menu of the shown chat: copy, export, import.

import { toast } from "./banner.js";
import { byId, copyFrom, icon } from "./dom.js";
import { asJson, asMarkdown, download, fromJson } from "./transfer.js";

/** `actions`: {current(), add(conversation)}. Returns {refresh()}. */
export function setupShare(actions) {
  const menu = byId("share-menu");
  const button = byId("share");
  button.append(icon("share"));
  const items = {
    "share-copy": () => copyFrom(button, asMarkdown(actions.current())),
    "share-markdown": () => download(actions.current().title, "md", asMarkdown(actions.current())),
    "share-json": () => download(actions.current().title, "json", asJson(actions.current())),
  };
  for (const [id, run] of Object.entries(items))
    byId(id).addEventListener("click", () => {
      menu.hidePopover();
      run();
    });
  const file = byId("import-file");
  byId("import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      actions.add(fromJson(await chosen.text()));
    } catch (error) {
      toast(`${chosen.name}: ${error.message}`);
    }
  });
  return { refresh: () => (button.hidden = !Object.keys(actions.current().nodes).length) };
}
