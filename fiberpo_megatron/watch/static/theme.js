// The theme is the system's (prefers-color-scheme) unless a person chose one on this page; the browser keeps the choice.

const KEY = "fiberpo-watch-theme";

/** Return "light", "dark", or null for the system's. */
export function storedTheme() {
  const found = localStorage.getItem(KEY);
  return found === "light" || found === "dark" ? found : null;
}

/** Return the choice that follows another one: the system's, light, dark. */
export function nextTheme(theme) {
  return { light: "dark", dark: null }[theme] ?? (theme === null ? "light" : null);
}

/** Use a theme, null for the system's. */
export function setTheme(theme) {
  if (theme === null) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, theme);
  applyTheme();
}

/** Let the page follow the stored choice. */
export function applyTheme() {
  const theme = storedTheme();
  if (theme === null) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** Return whether the page is dark now. */
export function isDark() {
  return (storedTheme() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

/** Return the value of a colour of style.css, for what is drawn on a canvas. */
export function themeColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
