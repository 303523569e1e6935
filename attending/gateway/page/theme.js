// Runs before the first paint, so that a dark room sees no white flash: hence not a module.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    let chosen = null;
    try {
      chosen = localStorage.getItem("attending.theme");
    } catch {
      // Storage is forbidden; the system's choice holds.
    }
    document.documentElement.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
  };
  show();
  system.addEventListener("change", show);
  addEventListener("storage", show);
})();
