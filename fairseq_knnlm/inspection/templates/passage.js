"use strict";
// The memories of one token are open at a time. The passage, and each list of tokens above it, is
// one stop of the Tab key: within it the arrow keys, Home and End move.
document.documentElement.classList.add("scripted");
const aside = document.querySelector("aside");
const groups = [...document.querySelectorAll("[data-arrows]")].map(
  (element) => [...element.querySelectorAll(".token")]);
const byHash = new Map(groups[groups.length - 1].map((token) => [token.hash, token]));
let chosen = null;

function close() {
  if (!chosen) return;
  document.querySelector(chosen.hash).classList.remove("open");
  chosen.removeAttribute("aria-current");
  chosen = null;
  aside.classList.remove("chosen");
  history.replaceState(null, "", location.pathname + location.search);
}

function open(hash) {
  const token = byHash.get(hash);
  if (!token || token === chosen) return;
  close();
  chosen = token;
  document.querySelector(hash).classList.add("open");
  token.setAttribute("aria-current", "true");
  token.scrollIntoView({ block: "nearest" });
  makeStop(token);
  aside.classList.add("chosen");
  aside.scrollTop = 0;
  history.replaceState(null, "", hash);
}

function groupOf(token) {
  return groups.find((group) => group.includes(token));
}

function makeStop(token) {
  for (const other of groupOf(token)) other.tabIndex = other === token ? 0 : -1;
}

function goTo(token) {
  if (!token) return;
  makeStop(token);
  token.focus();
  open(token.hash);
}

function moved(group, place, key) {
  switch (key) {
    case "ArrowLeft": return group[place - 1];
    case "ArrowRight": return group[place + 1];
    case "Home": return group[0];
    case "End": return group[group.length - 1];
  }
}

document.addEventListener("click", (event) => {
  const token = event.target.closest(".token");
  if (!token) return;
  event.preventDefault();
  goTo(token);
});

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const token = event.target.closest(".token") || (event.target === document.body && chosen);
  if (event.key === "Escape" && chosen) {
    const stop = token || chosen;
    close();
    stop.focus();
  } else if (token && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) {
    event.preventDefault();
    const group = groupOf(token);
    goTo(moved(group, group.indexOf(token), event.key));
  }
});

window.addEventListener("hashchange", () => open(location.hash));
groups.filter((group) => group.length).forEach((group) => makeStop(group[0]));
open(location.hash);
