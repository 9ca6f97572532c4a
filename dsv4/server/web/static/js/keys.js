// Keys that input methods take for themselves.

/** True for a key that confirms or drops an input method's word. Safari says so by the key's code alone. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;
