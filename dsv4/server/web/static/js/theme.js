// Runs before the first paint, so that a chosen theme does not flash. A classic script for that reason.
(function () {
  try {
    const theme = localStorage.getItem("dsv4.theme");
    if (theme) document.documentElement.dataset.theme = JSON.parse(theme);
  } catch {
    // Storage is blocked: the system's colours are used.
  }
})();
