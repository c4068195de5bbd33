"use strict";
// Puts an explorer's page into a frame, in the place of its stand-in. The page says how tall it is; it is told
// whether what is round it is light or dark.

function embedExplorer(key, title, page) {
  for (const place of document.querySelectorAll(`[data-explorer="${key}"]:not([data-drawn])`)) {
    place.dataset.drawn = "";
    const frame = document.createElement("iframe");
    frame.title = title;
    frame.setAttribute("sandbox", "allow-scripts");
    frame.style.cssText = "display:block;width:100%;height:600px;border:0;color-scheme:normal";
    frame.srcdoc = page;
    const tell = () => frame.contentWindow?.postMessage({ theme: themeAround() }, "*");
    frame.addEventListener("load", tell);
    window.addEventListener("message", (event) => {
      if (event.source === frame.contentWindow && Number.isFinite(event.data.height)) {
        frame.style.height = `${event.data.height}px`;
      }
    });
    const watch = new MutationObserver(tell);
    for (const element of [document.documentElement, document.body]) {
      const attributeFilter = ["class", "data-theme", "data-jp-theme-light"];
      watch.observe(element, { attributes: true, attributeFilter });
    }
    place.replaceChildren(frame);
  }
}

// "light" or "dark" where JupyterLab, VS Code or Sphinx's themes say so; null: as the system has it.
function themeAround() {
  const { jpThemeLight } = document.body.dataset;
  if (jpThemeLight !== undefined) return jpThemeLight === "false" ? "dark" : "light";
  const classes = document.body.classList;
  if (classes.contains("vscode-dark") || classes.contains("vscode-high-contrast")) return "dark";
  if (classes.contains("vscode-light")) return "light";
  const { theme } = document.documentElement.dataset;
  return theme === "light" || theme === "dark" ? theme : null;
}
