// The connection to the server: its models, a banner while it is unreachable, and the API key that it asks for.

import { describe, listModels, throwIfStopped } from "./api.js";
import { askKey, hideBanner, showBanner } from "./banner.js";
import { chosenModel, showModels } from "./models.js";
import { offerKey } from "./settings.js";

const ASK_AGAIN = 4000; // ms, while the server is unreachable

/** `actions`: {listed() after the models have arrived, accepted() after an entered key was}. */
export function setupConnection(actions) {
  const contexts = new Map(); // model -> tokens
  let listing; // promise of the latest list of models
  let nextTry = 0; // timer

  const needKey = () => {
    offerKey();
    // Check the key with the model list before the question: a late refusal could come after the next key.
    askKey(async () => (await connect()) && actions.accepted());
  };

  const list = async () => {
    clearTimeout(nextTry);
    let error;
    try {
      const models = await listModels();
      for (const { id, context } of models) contexts.set(id, context);
      showModels(models.map((model) => model.id));
      actions.listed();
      await throwIfStopped();
      hideBanner();
      return true;
    } catch (caught) {
      error = describe(caught);
    }
    if (error.kind === "key") {
      needKey();
      return false;
    }
    showBanner(error, connect);
    nextTry = setTimeout(connect, ASK_AGAIN);
    return false;
  };

  /** Requests the model list -> true if it arrived; while the server is unreachable, shows a banner and polls. */
  const connect = () => (listing = list());

  return {
    connect,
    needKey,
    /** Tokens that the chosen model can read. */
    context: () => contexts.get(chosenModel()),
    /** The chosen model. Waits for a model list that is on its way, and requests it again if it failed. */
    model: async () => {
      if (!(await listing)) await connect();
      return chosenModel();
    },
  };
}
