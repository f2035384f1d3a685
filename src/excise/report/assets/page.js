"use strict";
(() => {
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const parsed = (id) => { const found = find(id); return found ? JSON.parse(found.textContent) : null; };
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function drawn(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function number(value, digits = 4) {
    if (value === null || value === undefined) return "∞";
    const text = Math.abs(value) >= 1000 && Math.abs(value) < 1e7
      ? Math.round(value).toLocaleString("en-GB") : String(Number(value.toPrecision(digits)));
    return text.replace("-", "−");
  }
  const signed = (value) => value === null ? "∞" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
  function ranges(indices) {
    const runs = [];
    for (const i of indices) {
      const last = runs.at(-1);
      if (last && i === last.at(-1) + 1) last.push(i); else runs.push([i]);
    }
    return runs.map((r) => r.length > 2 ? `${r[0]}–${r.at(-1)}` : r.join(", ")).join(", ");
  }
  const key = (removed) => removed.join(",");

  // ---- the explorer: strip, spectrum, measured proposals, frequency ----
  const data = parsed("#explorer-data");
  const now = { budget: null, energy: null, removed: [], origin: "run" };

  function view() {
    return data.views.find((v) => v.energy === now.energy && v.budget === now.budget);
  }
  const measuredHere = () => data.measured[now.budget] ?? [];
  const runHere = () => data.runs.find((run) => run.budget === now.budget);
  const measurement = (removed) => measuredHere().find((m) => key(m.removed) === key(removed));

  function colourOf(removed, origin) {
    const run = runHere();
    if (run && key(run.removed) === key(removed)) return "chosen";
    if (origin === "state") return "ours";
    const methods = measurement(removed)?.methods ?? [];
    if (methods.some((m) => m.includes(":") && !m.startsWith("random"))) return "ours";
    return methods.every((m) => m.startsWith("random")) ? "random" : "rival";
  }
  function barcode(removed, colour) {
    const bars = removed.map((i) => `M${i + 0.08} 0h.84v1h-.84z`).join("");
    const image = drawn("svg", { class: "barcode", viewBox: `0 0 ${data.blocks} 1`, preserveAspectRatio: "none",
      role: "img", "aria-label": ranges(removed), style: `--c:var(--${colour})`, "data-tip": ranges(removed) });
    image.append(drawn("path", { d: bars }));
    return image;
  }
  function select(removed, origin) {
    Object.assign(now, { removed, origin });
    const chosen = new Set(removed);
    const colour = colourOf(removed, origin);
    find("#strip").style.setProperty("--c", `var(--${colour})`);
    find(".selection").style.setProperty("--c", `var(--${colour})`);
    for (const cell of all("#strip li")) {
      const block = Number(cell.dataset.block);
      const kind = data.kinds[block] ? `, ${data.kinds[block]}` : "";
      const size = data.sizes[block] ? `, ${data.sizes[block].toLocaleString("en-GB")} parameters` : "";
      cell.classList.toggle("removed", chosen.has(block));
      cell.dataset.tip = `block ${block}${kind}${size}${chosen.has(block) ? ", removed" : ""}`;
      find(".sr", cell).textContent = chosen.has(block) ? " removed" : "";
    }
    describe();
    for (const row of all("#spectrum tbody tr, #measured tbody tr")) {
      const on = row.dataset.removed === key(removed);
      row.classList.toggle("selected", on);
      find("button", row).setAttribute("aria-pressed", String(on));
    }
    for (const mark of all(".mark[data-removed]")) mark.classList.toggle("on", mark.dataset.removed === key(removed));
  }
  function describe() {
    const { removed } = now;
    const states = view()?.states ?? [];
    const place = states.findIndex((s) => key(s.removed) === key(removed));
    const found = measurement(removed);
    const run = runHere();
    const isRun = run && key(run.removed) === key(removed);
    const state = place < 0 ? "" : place === 0 ? `ground state of ${now.energy}` : `state ${place} of ${now.energy}`;
    const by = found ? found.methods.join(", ") : "";
    find("#selection-name").textContent = isRun ? `Removed by this run: ${run.said}`
      : state ? state[0].toUpperCase() + state.slice(1) : `Proposed by ${by}`;
    find("#selection-removed").textContent = ranges(removed);
    let energy = "not among the listed states";
    if (place >= 0) {
      const ground = states[0].energy;
      const above = place && ground ? ` (+${((states[place].energy - ground) / Math.abs(ground) * 100).toFixed(1)} %)` : "";
      energy = number(states[place].energy, 6) + above;
    } else if (found && found.energy !== null) {
      energy = `${number(found.energy, 6)} (${data.energy ?? "energy of the run"})`;
    }
    find("#selection-energy").textContent = energy;
    const rank = found ? measuredHere().indexOf(found) + 1 : 0;
    find("#selection-damage").textContent = found
      ? `Δ loss ${signed(found.delta)}${found.repaired === null ? "" : `, repaired ${signed(found.repaired)}`}, `
        + `perplexity ${number(found.perplexity)}, rank ${rank} of ${measuredHere().length}`
      : `not measured; excise verify MODEL --removed ${removed.join(",")}`;
    const gone = removed.reduce((sum, i) => sum + (data.sizes[i] ?? NaN), 0);
    find("#selection-parameters").textContent = data.parameters && Number.isFinite(gone)
      ? `${((1 - gone / data.parameters) * 100).toFixed(1)} %` : "not known";
    find("#back-to-run").hidden = !run || isRun;
  }
  const cell = (text, kind = "n") => element("td", { class: kind }, text);
  function row(removed, origin, first, deciding, others, label) {
    const button = element("button", { type: "button", "aria-pressed": "false", "aria-label": label });
    const colour = colourOf(removed, origin);
    first.forEach((name, k) => {
      const dot = origin === "measured" && k === 0 ? [element("span", { class: "dot", style: `--c:var(--${colour})` })] : [];
      button.append(element("span", { class: "whole" }, ...dot, name + (k + 1 < first.length ? "," : "")), " ");
    });
    button.addEventListener("click", () => select(removed, origin));
    const head = element("th", { scope: "row" }, button);
    // What decides stands beside the name, where a narrow screen shows it.
    const made = element("tr", { "data-removed": key(removed) }, head, ...deciding,
      element("td", {}, barcode(removed, colour)), ...others);
    if (colour === "chosen") made.classList.add("chosen");
    return made;
  }
  function show() {
    const shown = view();
    const states = shown?.states ?? [];
    find("#certificate").textContent = shown ? shown.certificate
      : `No spectrum${now.energy ? ` of ${now.energy}` : ""} at M = ${now.budget} in this folder.`;
    find("#spectrum tbody").replaceChildren(...states.map((s, k) => {
      const found = measurement(s.removed);
      const damage = found ? signed(found.delta) : "–";
      return row(s.removed, "state", [String(k)], [cell(number(s.energy, 5)), cell(damage)], [],
        `State ${k}: removes ${ranges(s.removed)}, energy ${number(s.energy, 5)}${found ? `, Δ loss ${damage}` : ""}`);
    }));
    const found = measuredHere();
    const repaired = found.some((m) => m.repaired !== null);
    find("#measured").classList.toggle("unrepaired", !repaired);
    const order = repaired ? "least damage first, repaired where that was tried" : "least damage first";
    find("#measured-note").textContent = found.length ? `${found.length} removals on the text that chose, ${order}`
      : `Nothing is measured at M = ${now.budget} in this folder.`;
    find("#measured tbody").replaceChildren(...found.map((m) =>
      row(m.removed, "measured", m.methods,
        [cell(signed(m.delta)), cell(m.repaired === null ? "" : signed(m.repaired), "n after-repair")],
        [cell(number(m.perplexity))],
        `${m.methods.join(", ")}: removes ${ranges(m.removed)}, Δ loss ${signed(m.delta)}`)));
    const boxes = all("[data-budget]").filter((box) => box.tagName === "DIV");
    const here = boxes.some((box) => Number(box.dataset.budget) === now.budget);
    for (const box of boxes) box.hidden = Number(box.dataset.budget) !== now.budget;
    for (const note of all('p[data-budget="none"]')) note.hidden = here;
    const start = runHere()?.removed ?? states[0]?.removed ?? found[0]?.removed ?? [];
    select(start, runHere() ? "run" : states.length ? "state" : "measured");
    frequency(states.slice(0, data.lowest));
  }
  function frequency(states) {
    const counts = Array.from({ length: data.blocks }, (_, i) => states.filter((s) => s.removed.includes(i)).length);
    const note = states.length ? `Among the ${states.length} lowest states of ${now.energy} at M = ${now.budget}` : "";
    find("#frequency-note").textContent = states.length ? `${note}${runHere() ? "; ▲ marks what was removed" : ""}.`
      : "No spectrum at this M.";
    find("#frequency-table tbody").replaceChildren(...counts.map((count, i) => element("tr", {},
      element("th", { scope: "row" }, String(i)), element("td", { class: "n" }, String(count)))));
    find("#frequency").hidden = !states.length;
    const removed = new Set(runHere()?.removed ?? []);
    for (const bar of all("#frequency .bar")) {
      const block = Number(bar.dataset.block);
      bar.setAttribute("height", counts[block] / Math.max(states.length, 1));
      bar.dataset.tip = `block ${block}: in ${counts[block]} of ${states.length} states`;
    }
    for (const mark of all("#frequency .removed-mark")) {
      if (removed.has(Number(mark.dataset.block))) mark.removeAttribute("display");
      else mark.setAttribute("display", "none");
    }
  }
  function start() {
    now.energy = find('input[name="energy"]:checked')?.value ?? null;
    now.budget = data.budgets.includes(data.budget) ? data.budget : data.budgets[0];
    const slider = find("#budget");
    slider?.addEventListener("input", () => {
      now.budget = data.budgets[Number(slider.value)];
      slider.setAttribute("aria-valuetext", `${now.budget} of ${data.blocks} blocks`);
      find("#budget-value").textContent = `${now.budget} of ${data.blocks}`;
      show();
    });
    for (const choice of all('input[name="energy"]')) choice.addEventListener("change", () => {
      now.energy = choice.value;
      show();
    });
    find("#back-to-run").addEventListener("click", () => {
      select(runHere().removed, "run");
      find("#selection-name").focus?.();
    });
    for (const mark of all(".mark[data-removed]")) mark.addEventListener("click", () => {
      select(mark.dataset.removed.split(",").map(Number), "measured");
    });
    show();
  }
  if (data) start();

  // ---- the coupling matrix ----
  const matrix = parsed("#matrix-data");
  function exploreMatrix() {
    const box = find("#matrix"), cell = find("#matrix-cell"), said = find("#matrix-value");
    let at = [0, 0];
    const index = (i, j) => { const [a, b] = i < j ? [i, j] : [j, i]; return a * matrix.n - a * (a - 1) / 2 + b - a; };
    function point(i, j) {
      at = [i, j];
      const share = 100 / matrix.n;
      Object.assign(cell.style, { left: `${j * share}%`, top: `${i * share}%`, width: `${share}%`, height: `${share}%` });
      cell.hidden = false;
      const k = index(i, j);
      const pair = i === j ? `block ${i}` : `blocks ${i} and ${j}`;
      said.textContent = `${pair}: J = ${number(matrix.values[k])}, correlation ${number(matrix.correlations[k], 3)}`;
    }
    box.addEventListener("pointermove", (event) => {
      const area = box.getBoundingClientRect();
      const clamp = (value) => Math.max(0, Math.min(matrix.n - 1, Math.floor(value * matrix.n)));
      point(clamp((event.clientY - area.top) / area.height), clamp((event.clientX - area.left) / area.width));
    });
    box.addEventListener("keydown", (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const within = (value) => Math.max(0, Math.min(matrix.n - 1, value));
      point(cell.hidden ? 0 : within(at[0] + move[0]), cell.hidden ? 0 : within(at[1] + move[1]));
    });
    for (const choice of all('input[name="matrix"]')) choice.addEventListener("change", () => {
      for (const part of all("[data-view]")) part.hidden = part.dataset.view !== choice.value;
    });
  }
  if (matrix) exploreMatrix();

  // ---- tooltips and the copy buttons ----
  const tip = find("#tip");
  document.addEventListener("pointermove", (event) => {
    const text = event.target.closest?.("[data-tip]")?.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, window.innerWidth - width - 4))}px`;
    tip.style.top = `${event.clientY + 18 + height > window.innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  for (const button of all("button.copy")) button.addEventListener("click", async () => {
    const command = find("pre", button.parentElement);
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(command);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
})();
