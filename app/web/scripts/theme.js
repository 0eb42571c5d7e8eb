// Before anything is drawn, so that nothing flashes: the theme that was chosen here, or the system's.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("quartet-theme");
  } catch { /* a browser that keeps nothing */ }
  const isDark = () => (chosen ? chosen === "dark" : dark.matches);

  const apply = () => {
    if (chosen) document.documentElement.dataset.theme = chosen;
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  };
  apply();
  dark.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = isDark() ? "light" : "dark";
      try {
        localStorage.setItem("quartet-theme", chosen);
      } catch { /* then it lasts as long as the page */ }
      apply();
    });
  });
})();
