"use strict";
// Shows the texts. All of them are untrusted: they become text nodes, never markup.

const texts = JSON.parse(document.getElementById("texts").textContent);

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---------------------------------------------------------------- one completion

function probeMark(segment, passed) {
  let said = "probe " + segment.confidence.toFixed(3);
  if (segment.answer) said += ": " + segment.answer;
  if (typeof segment.correct === "boolean") said += segment.correct ? " (right)" : " (wrong)";
  return element("span", passed ? "probe passed" : "probe", said);
}

function segmentNode(segment, next, reason) {
  switch (segment.kind) {
    case "trigger": return element("mark", "trigger", segment.text);
    case "forced": return element("mark", "forced", segment.text);
    case "exit": return element("span", "exit", "exit: " + segment.reason);
    case "probe": return probeMark(segment, reason === "early_exit" && next && next.kind === "exit");
    default: return document.createTextNode(segment.text);
  }
}

function completionText(completion, label) {
  const text = element("pre", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "region");
  text.setAttribute("aria-label", label);
  completion.segments.forEach((segment, i) =>
    text.append(segmentNode(segment, completion.segments[i + 1], completion.reason)));
  return text;
}

function verdict(correct) {
  return element("span", correct ? "right" : "wrong", correct ? "right" : "wrong");
}

function counted(number, what) {
  return number + " " + what + (number === 1 ? "" : "s");
}

function factsOf(completion, more) {
  const facts = element("p");
  const rest = [counted(completion.tokens, "token"), counted(completion.steps, "step"), ...more];
  facts.append(verdict(completion.correct), " · " + rest.join(" · "));
  return facts;
}

function rolloutDetail(rollout) {
  const more = [texts.reasons[rollout.reason] || rollout.reason,
    "reward " + rollout.reward.toFixed(3), "advantage " + rollout.advantage.toFixed(3)];
  const placed = rollout.segments.some((segment) => segment.kind === "probe");
  if (!placed && rollout.confidences.length)
    more.push("checks " + rollout.confidences.map((c) => c.toFixed(3)).join(", "));
  return [element("h3", "", rollout.prompt), element("p", "", "Right answer: " + rollout.answer),
    factsOf(rollout, more), completionText(rollout, "Completion")];
}

function pairDetail(pair) {
  const sides = element("div", "sides");
  for (const name of ["before", "after"]) {
    const side = element("div");
    side.append(element("h4", "", name));
    if (pair[name]) side.append(factsOf(pair[name], ["exit: " + pair[name].reason]), completionText(pair[name], "Completion " + name));
    else side.append(element("p", "", "There is none."));
    sides.append(side);
  }
  return [element("h3", "", pair.prompt), element("p", "", "Right answer: " + pair.answer), sides];
}

// ---------------------------------------------------------------- the two lists

function changeOf(pair) {
  if (!pair.before || !pair.after) return "";
  const was = pair.before.correct ? "right" : "wrong", is = pair.after.correct ? "right" : "wrong";
  return was === is ? is + " twice" : was + " to " + is;
}

function wording(row) {
  const sides = [row, row.before, row.after].filter((side) => side && side.segments);
  const said = sides.flatMap((side) => side.segments.map((segment) => segment.text || ""));
  return (row.prompt + " " + said.join("")).toLowerCase();
}

const LISTS = {
  rollouts: {
    label: (r) => "step " + r.step + " · " + (r.correct ? "right" : "wrong") + " · " + r.reason + " · " + r.tokens + " tokens",
    kept: (r, f) => (!f.reason || r.reason === f.reason) && (!f.correct || (f.correct === "right") === r.correct),
    detail: rolloutDetail,
  },
  pairs: {
    label: (p) => p.prompt.slice(0, 60) + (p.sample ? " · sample " + (p.sample + 1) : ""),
    kept: (p, f) => !f.change || changeOf(p) === f.change,
    detail: pairDetail,
  },
};

function startViewer(viewer) {
  const rows = texts[viewer.dataset.list], list = LISTS[viewer.dataset.list];
  const form = viewer.querySelector("form"), pick = viewer.querySelector(".pick");
  const detail = viewer.querySelector(".detail"), output = viewer.querySelector("output");

  function show() {
    const row = rows[pick.value];
    detail.replaceChildren(...(row ? list.detail(row) : [element("p", "", "Nothing fits these filters.")]));
  }
  function filter() {
    const wanted = Object.fromEntries(new FormData(form)), word = wanted.text.toLowerCase();
    const fitting = rows.map((row, i) => i).filter((i) =>
      list.kept(rows[i], wanted) && (!word || wording(rows[i]).includes(word)));
    pick.replaceChildren(...fitting.map((i) => {
      const option = element("option", "", list.label(rows[i]));
      option.value = i;
      return option;
    }));
    pick.selectedIndex = fitting.length ? 0 : -1;
    output.textContent = "(" + fitting.length + " of " + rows.length + ")";
    show();
  }
  function turn(by) {
    const to = pick.selectedIndex + by;
    if (to < 0 || to >= pick.length) return;
    pick.selectedIndex = to;
    show();
  }

  const reason = form.elements.reason;
  if (reason) for (const name of [...new Set(rows.map((row) => row.reason))].sort())
    reason.append(element("option", "", name));
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  pick.addEventListener("change", show);
  for (const button of viewer.querySelectorAll("button"))
    button.addEventListener("click", () => turn(Number(button.dataset.turn)));
  filter();
}

document.querySelectorAll(".viewer").forEach(startViewer);

// ---------------------------------------------------------------- the numbers under the pointer

function startPointer(figure) {
  const plot = figure.querySelector(".plot"), svg = plot && plot.querySelector("svg");
  if (!svg) return;
  const heads = [...figure.querySelectorAll("thead th")].map((cell) => cell.textContent);
  const rows = [...figure.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  const steps = rows.map((row) => Number(row[0]));
  const low = steps[0], span = steps[steps.length - 1] - low;
  const left = Number(svg.dataset.left), right = Number(svg.dataset.right), view = svg.viewBox.baseVal;
  const place = (step) => span ? left + (step - low) / span * (right - left) : (left + right) / 2;
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", "10");
  cursor.setAttribute("y2", "188");
  const tip = element("div", "tip");

  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * view.width;
    let near = 0;
    steps.forEach((step, i) => { if (Math.abs(place(step) - at) < Math.abs(place(steps[near]) - at)) near = i; });
    const x = place(steps[near]);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    svg.append(cursor);
    tip.textContent = rows[near].map((cell, i) => heads[i] + " " + cell).join("\n");
    plot.append(tip);
    const beside = x / view.width * box.width;
    tip.style.left = (x < view.width / 2 ? beside + 10 : Math.max(0, beside - tip.offsetWidth - 10)) + "px";
  });
  plot.addEventListener("pointerleave", () => { cursor.remove(); tip.remove(); });
}

document.querySelectorAll("figure[data-stepwise]").forEach(startPointer);
