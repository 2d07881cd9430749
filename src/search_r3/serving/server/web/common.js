// Elements of the page, and what it says where something failed.

import { hasToken, setToken } from "./api.js";

export const byId = (id) => document.getElementById(id);

export function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export const plural = (count, one, more) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

export function explain(error) {
  if (error.name === "AbortError") return;
  byId("message").textContent = error.status === 401 ? "The server asks for its token." : error.message;
  byId("message").hidden = false;
  if (error.status !== 401) return;
  byId("token-title").textContent = hasToken() ? "This is not the server's token" : "A token is needed";
  setToken("");
  if (!byId("token").open) byId("token").showModal();
}
