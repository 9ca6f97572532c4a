// Runs before the first paint, as a classic script, so that the default theme does not flash.
(function () {
  try {
    const theme = localStorage.getItem("dsv4.theme");
    if (theme) document.documentElement.dataset.theme = JSON.parse(theme);
  } catch {
    // Storage is blocked: the system's theme is used.
  }
})();
