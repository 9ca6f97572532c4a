// Waiting for a server that is busy.

export const TRIES = 20; // per request to a busy server that sends Retry-After

/** The promise, or a rejection with the signal's reason once it is aborted. */
export function unlessStopped(promise, signal) {
  const stopped = new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  return Promise.race([promise, stopped]);
}
