"use strict";
// Filters over the answers, and the light/dark switch. Without this script the page shows everything.
(() => {
  const root = document.documentElement;
  const items = [...document.querySelectorAll("#answers details.item")];
  const tag = document.getElementById("tag");
  const words = document.getElementById("words");
  const count = document.getElementById("count");
  const open = document.getElementById("open");
  const theme = document.getElementById("theme");

  function filter() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const text = wanted.length ? item.textContent.toLowerCase() : "";
      const fits = (!tag.value || item.dataset.tags.split(" ").includes(tag.value)) && wanted.every((word) => text.includes(word));
      item.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${items.length} items`;
  }

  function openTarget() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) {
      tag.value = words.value = "";
      filter();
      target.open = true;
      target.scrollIntoView();
    }
  }

  document.getElementById("filters").hidden = false;
  tag.addEventListener("change", filter);
  words.addEventListener("input", filter);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  open.addEventListener("click", () => {
    const closed = items.some((item) => !item.hidden && !item.open);
    for (const item of items) if (!item.hidden) item.open = closed;
    open.textContent = closed ? "Close all" : "Open all";
  });

  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  label();

  addEventListener("hashchange", openTarget);
  filter();
  openTarget();
})();
