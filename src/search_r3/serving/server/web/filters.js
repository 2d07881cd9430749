// Conditions that documents must fit: chosen from the fields that the store has, shown as buttons that remove them.

import { byId, make } from "./common.js";

const OPERATORS = {
  text: [["$in", "is"], ["$nin", "is not"], ["$prefix", "begins with"]],
  number: [["$in", "="], ["$nin", "≠"], ["$gte", "≥"], ["$lte", "≤"]],
  boolean: [["$in", "is"]],
  list: [["$contains", "has"]],
};
const SIGNS = Object.fromEntries(Object.values(OPERATORS).flat());
const MANY = ["$in", "$nin"];

let fields = [];
let conditions = [];
let changed = () => {};

const chosen = () => fields[byId("field").selectedIndex];

function kindOf(field) {
  const kind = typeof field.values[0][0];
  return field.list ? "list" : kind in OPERATORS ? kind : "text";
}

export function showFields(found, onChange) {
  const before = byId("field").value;
  fields = found;
  changed = onChange;
  byId("field").replaceChildren(...fields.map((field) => new Option(field.name)));
  if (fields.some((field) => field.name === before)) byId("field").value = before;
  byId("filter").hidden = !fields.length;
  if (fields.length) showOperators();
}

function showOperators() {
  const field = chosen();
  byId("operator").replaceChildren(...OPERATORS[kindOf(field)].map(([value, text]) => new Option(text, value)));
  byId("values").replaceChildren(...field.values.map(([value, count]) => new Option(`${value} (${count})`, value)));
  byId("value").value = "";
}

// What was typed has the type of the field's known values.
function typed(field, text) {
  const known = field.values.find(([value]) => String(value) === text);
  if (known) return known[0];
  return kindOf(field) === "number" && text.trim() && !Number.isNaN(Number(text)) ? Number(text) : text;
}

function add() {
  const text = byId("value").value;
  const [field, operator] = [chosen(), byId("operator").value];
  if (!field || !text) return byId("value").focus();
  const condition = { name: field.name, operator, value: typed(field, text) };
  const isSame = (other) => {
    const isTwin = other.name === condition.name && other.operator === operator;
    return isTwin && (!MANY.includes(operator) || other.value === condition.value);
  };
  conditions = [...conditions.filter((other) => !isSame(other)), condition];
  byId("value").value = "";
  showConditions();
  changed();
}

function showConditions() {
  byId("conditions").replaceChildren(
    ...conditions.map((condition) => {
      const text = `${condition.name} ${SIGNS[condition.operator] ?? condition.operator} ${condition.value}`;
      const button = make("button", "", `${text} ✕`);
      button.type = "button";
      button.setAttribute("aria-label", `Remove the condition ${text}`);
      button.addEventListener("click", () => {
        conditions = conditions.filter((other) => other !== condition);
        showConditions();
        byId("query").focus();
        changed();
      });
      const item = make("li");
      item.append(button);
      return item;
    }),
  );
}

// As the server takes it: {field: {operator: value}}; null where there is none.
export function where() {
  const filter = {};
  for (const { name, operator, value } of conditions) {
    filter[name] ??= {};
    if (MANY.includes(operator)) (filter[name][operator] ??= []).push(value);
    else filter[name][operator] = value;
  }
  return conditions.length ? filter : null;
}

export function setWhere(filter) {
  conditions = Object.entries(filter ?? {}).flatMap(([name, tests]) =>
    Object.entries(tests).flatMap(([operator, value]) => {
      return (MANY.includes(operator) ? value : [value]).map((one) => ({ name, operator, value: one }));
    }),
  );
  showConditions();
}

byId("field").addEventListener("change", showOperators);
byId("add-condition").addEventListener("click", add);
byId("value").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  add();
});
