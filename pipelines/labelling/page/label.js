// The labelling page. The server decides what is shown; this file shows it and sends what the annotator chose.
// Texts are set with textContent only, so that no answer is ever interpreted as HTML.
"use strict";

const token = new URLSearchParams(location.hash.slice(1)).get("token") || sessionStorage.getItem("token") || "";
if (token) sessionStorage.setItem("token", token);
history.replaceState(null, "", location.pathname);
const $ = (id) => document.getElementById(id);
let annotator = sessionStorage.getItem("annotator") || "";
let state = null;
let busy = false;
let marks = []; // scores by place, or places from best to worst

const KEYS = {
  pairs: [
    ["first", "First is better", "1", "ArrowLeft"],
    ["second", "Second is better", "2", "ArrowRight"],
    ["tie", "Equally good", "=", "0"],
    ["bad", "Both are bad", "b", "B"],
  ],
};
const PLACES = ["First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Tenth"];

// Send a request until the server has answered it. A judgement has a key, so sending it twice counts once.
async function send(path, body) {
  for (let wait = 200; ; wait = Math.min(2 * wait, 3000)) {
    try {
      const answer = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: "Bearer " + token },
        body: JSON.stringify({ annotator, ...body }),
      });
      const found = await answer.json();
      if (answer.ok) { $("problem").textContent = ""; return found; }
      $("problem").textContent = found.error || "the server refused the request";
      if (answer.status < 500) return null;
    } catch (error) {
      $("problem").textContent = "The server does not answer. Your last judgement is kept here and sent again.";
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function act(path, body) {
  if (busy) return;
  busy = true;
  if (path === "/judge") {
    body.key = crypto.randomUUID();
    body.annotator = annotator; // also if it is sent again after a different person has begun here
    sessionStorage.setItem("pending", JSON.stringify(body)); // a reload of the page sends it again
  }
  const found = await send(path, body);
  sessionStorage.removeItem("pending");
  busy = false;
  if (found) show(found);
}

const judge = (value) => state && state.item && act("/judge", { task: state.item.task, value });

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function button(text, key, action, attributes = {}) {
  const made = element("button", text, { type: "button", ...attributes });
  if (key) {
    made.append(element("kbd", key.replace("ArrowLeft", "←").replace("ArrowRight", "→"), { "aria-hidden": "true" }));
    made.setAttribute("aria-keyshortcuts", key);
  }
  made.addEventListener("click", action);
  return made;
}

function show(found) {
  state = found;
  marks = [];
  $("start").hidden = true;
  $("who").textContent = annotator;
  $("progress").max = state.total;
  $("progress").value = state.done;
  const item = state.item;
  $("work").hidden = false;
  $("end").hidden = item !== null;
  for (const id of ["prompt", "answers", "controls", "help"]) $(id).hidden = item === null;
  $("prompt-title").hidden = item === null;
  const more = [button("Undo", "u", () => act("/undo", {}))];
  more[0].disabled = !state.can_undo;
  if (item) more.unshift(button("Skip", "s", () => judge("skip")));
  more.push(button("Hand over and pause", "", finish));
  $("more").replaceChildren(...more);
  if (!item) {
    $("title").textContent = "Done";
    say(`${state.done} of ${state.total} judged.`);
    return;
  }
  $("title").textContent = `Item ${state.done + 1} of ${state.total}`;
  say(`Item ${state.done + 1} of ${state.total}.`, "heard");
  showPrompt(item.prompt);
  $("answers").replaceChildren(...item.answers.map(answerCard));
  showControls();
  scrollTo(0, 0);
}

// A text of the class "heard" is only read out: the heading shows the same.
function say(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

function showPrompt(prompt) {
  const turns = typeof prompt === "string" ? [{ content: prompt }] : prompt;
  $("prompt").replaceChildren(...turns.flatMap((turn) => [
    ...(turn.role ? [element("p", turn.role, { class: "role" })] : []),
    element("pre", typeof turn.content === "string" ? turn.content : JSON.stringify(turn.content)),
  ]));
}

function answerCard(text, place) {
  const id = `answer-${place}`;
  const card = element("section", undefined, { "aria-labelledby": id });
  card.append(element("h2", `${PLACES[place] || place + 1} answer`, { id }), element("pre", text === "" ? "(empty)" : text));
  if (state.ask === "scores") {
    const digits = element("div", undefined, { class: "digits", role: "group", "aria-label": `Score of the ${PLACES[place]} answer` });
    for (let score = 1; score <= 10; score++) digits.append(button(String(score), "", () => { marks[place] = score; showControls(); }));
    card.append(digits);
  }
  if (state.ask === "ranking") card.append(button("Next best", String(place + 1), () => rank(place)));
  return card;
}

function rank(place) {
  if (marks.includes(place)) marks = marks.filter((each) => each !== place);
  else {
    marks = [...marks, place];
    if (marks.length === state.item.answers.length - 1) // one answer is left, so it is the worst
      marks.push(state.item.answers.findIndex((_, other) => !marks.includes(other)));
  }
  showControls();
}

const open = () => state.item.answers.findIndex((_, place) => marks[place] === undefined);
const complete = () => state.item && marks.filter((each) => each !== undefined).length === state.item.answers.length;

function showControls() {
  if (state.ask === "pairs") {
    $("controls").replaceChildren(...KEYS.pairs.map(([value, text, key]) => button(text, key, () => judge(value))));
    $("help").textContent = "Keys: 1 or ← first, 2 or → second, = or 0 equal, b both bad, s skip, u undo.";
    return;
  }
  const cards = [...$("answers").children];
  cards.forEach((card, place) => {
    card.classList.toggle("current", state.ask === "scores" && place === open());
    if (state.ask === "scores")
      [...card.querySelectorAll(".digits button")].forEach((each, i) => each.setAttribute("aria-pressed", String(marks[place] === i + 1)));
    else {
      const chosen = card.querySelector("button"), at = marks.indexOf(place);
      chosen.setAttribute("aria-pressed", String(at >= 0));
      chosen.firstChild.textContent = at < 0 ? "Next best" : `Rank ${at + 1}`;
    }
  });
  const save = button("Save", "Enter", () => judge(marks));
  save.disabled = !complete();
  $("controls").replaceChildren(save);
  $("help").textContent = state.ask === "scores"
    ? "Keys: 1 to 9 and 0 (ten) score the marked answer, Backspace clears the last score, Enter saves, s skips, u undoes."
    : "Keys: type the answers' numbers from best to worst, Backspace clears the last, Enter saves, s skips, u undoes.";
}

async function finish() {
  const found = await send("/finish", {});
  if (!found) return;
  show(found);
  say(`${found.handed} judgements were handed to the inbox. You can close the page, or go on.`);
}

document.addEventListener("keydown", (event) => {
  if (!state || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  const key = event.key;
  if (key === "u" || key === "U") { if (state.can_undo) act("/undo", {}); return; }
  if (!state.item) return;
  if (key === "s" || key === "S") { judge("skip"); return; }
  if (state.ask === "pairs") {
    const chosen = KEYS.pairs.find((each) => each.slice(2).includes(key));
    if (chosen) { event.preventDefault(); judge(chosen[0]); }
    return;
  }
  const digit = /^[0-9]$/.test(key) ? Number(key) : null;
  const count = state.item.answers.length;
  if (key === "Backspace") { event.preventDefault(); marks.pop(); showControls(); }
  else if (key === "Enter" && complete()) { event.preventDefault(); judge(marks); }
  else if (digit !== null && state.ask === "scores" && !complete()) { marks[open()] = digit || 10; showControls(); }
  else if (digit && digit <= count && state.ask === "ranking") rank(digit - 1);
});

$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = $("name").value.trim();
  sessionStorage.setItem("annotator", annotator);
  $("name").blur();
  begin();
});

async function begin() {
  const pending = sessionStorage.getItem("pending");
  if (pending) await send("/judge", JSON.parse(pending));
  sessionStorage.removeItem("pending");
  const found = await send("/state", {});
  if (found) show(found);
}

if (annotator) begin(); else $("name").focus();
