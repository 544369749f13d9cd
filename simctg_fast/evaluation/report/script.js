"use strict";
(() => {
  const make = (tag, attributes, ...inside) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...inside);
    return element;
  };
  const all = (selector, from) => [...(from || document).querySelectorAll(selector)];
  const said = document.getElementById("said");
  const say = (text) => { said.textContent = text; };

  // One text at a time, and the strategies to compare.
  const prompts = all("#prompts > .prompt");
  const controls = document.getElementById("choose-text");
  if (controls && prompts.length > 0) {
    const show = (chosen) => {
      prompts.forEach((prompt, i) => { prompt.hidden = i !== chosen; });
      select.selectedIndex = chosen;
      back.disabled = chosen === 0;
      next.disabled = chosen === prompts.length - 1;
    };
    const select = make("select", { id: "which-text" }, ...prompts.map((prompt, i) => {
      const words = prompt.querySelector("blockquote").textContent.replace(/\s+/g, " ").trim();
      const letters = [...words];
      return make("option", {}, `${i + 1}. ${letters.length > 70 ? letters.slice(0, 69).join("") + "…" : words}`);
    }));
    const step = (by, button) => () => {
      show(select.selectedIndex + by);
      if (button().disabled) select.focus();
      say(select.options[select.selectedIndex].textContent);
    };
    const back = make("button", { type: "button" }, "Previous");
    const next = make("button", { type: "button" }, "Next");
    back.addEventListener("click", step(-1, () => back));
    next.addEventListener("click", step(1, () => next));
    select.addEventListener("change", () => show(select.selectedIndex));
    if (prompts.length > 1) {
      controls.append(make("div", { class: "choice" }, make("label", { for: "which-text" }, "Prompt"), select), back, next);
      show(0);
    }
    const names = new Map();
    for (const one of all(".written")) names.set(one.dataset.strategy, one.querySelector("h4").textContent);
    if (names.size > 2) {
      const boxes = make("fieldset", {}, make("legend", {}, "Strategies to compare"));
      for (const [strategy, name] of names) {
        const box = make("input", { type: "checkbox" });
        box.checked = true;
        box.addEventListener("change", () => {
          for (const one of all(".written")) if (one.dataset.strategy === strategy) one.hidden = !box.checked;
        });
        boxes.append(make("label", {}, box, make("bdi", {}, name)));
      }
      controls.append(boxes);
    }
  }

  // Cells of the heat maps: by mouse, finger or arrow keys.
  const source = document.getElementById("similarity-data");
  if (source) {
    const { low, high, maps } = JSON.parse(source.textContent);
    const side = 360;
    all(".map").forEach((figure) => {
      const { pieces, prompt, levels } = maps[Number(figure.dataset.map)];
      const bytes = Uint8Array.from(atob(levels), (letter) => letter.charCodeAt(0));
      const size = pieces.length;
      const field = figure.querySelector(".field");
      const picture = field.querySelector("svg");
      const name = figure.querySelector("strong").textContent;
      const found = make("p", { class: "cosine" });
      const contexts = [make("span", { class: "context" }), make("span", { class: "context" })];
      figure.append(make("div", { class: "readout" }, found, ...contexts));
      const lines = ["cross under", "cross"].map((kind) => {
        const path = document.createElementNS(picture.namespaceURI, "path");
        path.setAttribute("class", kind);
        return picture.appendChild(path);
      });
      field.setAttribute("tabindex", "0");
      field.setAttribute("role", "application");
      field.setAttribute("aria-roledescription", "heat map");
      field.setAttribute("aria-label", `${name}: similarity of ${size} tokens. Arrow keys move over them, ten at a time with Shift, Home and End to the ends.`);
      let at = [Math.min(size - 1, prompt), 0];
      let isShown = false;
      const cut = (text) => ([...text].length > 40 ? `${[...text].slice(0, 39).join("")}…` : text);
      const quoted = (i) => `“${cut(pieces[i])}”`;
      const context = (element, i) => {
        const before = pieces.slice(Math.max(0, i - 6), i).join("");
        const after = pieces.slice(i + 1, i + 9).join("");
        element.replaceChildren(make("bdi", {}, (i > 6 ? "…" : "") + before, make("b", {}, cut(pieces[i])), after));
      };
      const cosine = (row, column) => {
        const [last, first] = row > column ? [row, column] : [column, row];
        return bytes[(last * (last + 1)) / 2 + first];
      };
      const describe = (row, column) => {
        const level = cosine(row, column);
        const value = (low + (level / 253) * (high - low)).toFixed(2).replace("-", "−").replace("−0.00", "0.00");
        const text = `${level > 253 ? "no number" : value} — token ${row} ${quoted(row)} and token ${column} ${quoted(column)}`;
        found.textContent = text;
        context(contexts[0], row);
        context(contexts[1], column);
        return text;
      };
      const show = (row, column, aloud) => {
        at = [row, column];
        isShown = true;
        const text = describe(row, column);
        const cell = side / size;
        const [x, y] = [column * cell, row * cell];
        const shape = `M0 ${y + cell / 2}H${x}M${x + cell} ${y + cell / 2}H${side}M${x + cell / 2} 0V${y}M${x + cell / 2} ${y + cell}V${side}M${x} ${y}h${cell}v${cell}h${-cell}z`;
        for (const line of lines) line.setAttribute("d", shape);
        if (aloud) say(text);
      };
      const hide = () => {
        isShown = false;
        for (const line of lines) line.removeAttribute("d");
      };
      // Until somebody asks: the two tokens of the continuation that are most alike.
      let most = null;
      for (let row = prompt + 1; row < size; row++) {
        for (let column = prompt; column < row; column++) {
          if (cosine(row, column) < 254 && (!most || cosine(row, column) > cosine(...most))) most = [row, column];
        }
      }
      if (most) {
        describe(...most);
        found.prepend("Most alike: ");
        at = most;
      }
      const point = (event) => {
        const frame = picture.getScreenCTM().inverse();
        const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(frame);
        if (place.x < 0 || place.y < 0 || place.x >= side || place.y >= side) return;
        show(Math.floor((place.y / side) * size), Math.floor((place.x / side) * size), false);
      };
      field.addEventListener("pointermove", point);
      field.addEventListener("pointerdown", point);
      field.addEventListener("focus", () => { if (!isShown && field.matches(":focus-visible")) show(at[0], at[1], true); });
      field.addEventListener("blur", hide);
      field.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && document.activeElement !== field) hide(); });
      field.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.altKey || event.metaKey) return;
        const far = event.shiftKey ? 10 : 1;
        const moves = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far], Home: [-size, -size], End: [size, size] };
        const move = moves[event.key];
        if (!move) return;
        event.preventDefault();
        const inside = (place) => Math.min(size - 1, Math.max(0, place));
        show(inside(at[0] + move[0]), inside(at[1] + move[1]), true);
      });
    });
  }

  // Buttons that copy.
  const written = async (text, element) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const range = document.createRange();
      range.selectNodeContents(element);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      return document.execCommand("copy");
    }
  };
  for (const block of all(".code")) {
    const code = block.querySelector("code");
    const title = block.querySelector("p").textContent;
    const section = block.closest(".setting, section");
    const owner = section.querySelector("h2, h3").textContent;
    const button = make("button", { type: "button", "aria-label": `Copy: ${owner}, ${title.toLowerCase()}` }, "Copy");
    button.addEventListener("click", async () => {
      const done = await written(code.textContent, code);
      button.textContent = done ? "Copied" : "Selected";
      say(done ? "Copied" : "The text is selected; copy it with the keyboard");
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    block.querySelector("p").append(button);
  }

  for (const element of all(".scripted")) element.hidden = false;
  addEventListener("beforeprint", () => { for (const one of all("details")) one.open = true; });
})();
