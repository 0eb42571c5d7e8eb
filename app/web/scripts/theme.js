// Apply the chosen theme, or the theme of the system, before the page is rendered, so that the colours do not change visibly.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("quartet-theme");
  } catch { /* storage is disabled */ }
  const isDark = () => (chosen ? chosen === "dark" : dark.matches);

  const apply = () => {
    if (chosen) document.documentElement.dataset.theme = chosen;
    document.documentElement.classList.toggle("dark-mode", isDark()); // for Swagger UI, which loads this script, too
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  };
  apply();
  dark.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme")?.addEventListener("click", () => {
      chosen = isDark() ? "light" : "dark";
      try {
        localStorage.setItem("quartet-theme", chosen);
      } catch { /* storage is disabled: the choice lasts as long as the page */ }
      apply();
    });
  });
})();
