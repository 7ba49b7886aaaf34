"use strict";
// The edge matrix of the report. All values come from the page's own data block; nothing is fetched.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const cells = $("cells");
  const printing = matchMedia("print");

  // What is folded on the screen is open on paper.
  const unfold = () => document.querySelectorAll("details").forEach((each) => (each.open = true));
  printing.addEventListener("change", () => printing.matches && unfold());
  addEventListener("beforeprint", unfold);

  const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const experiments = data.experiments.map((each) => {
    let read = null;
    return {
      label: each.label,
      family: each.family,
      names: each.names,
      graph: data.graphs[each.graph],
      /** Strengths [models][edges] and the edge of each column, unpacked when first looked at. */
      get edges() {
        return (read ??= unpack(each));
      },
    };
  });

  function unpack(packed) {
    const graph = data.graphs[packed.graph];
    const offsets = [0];
    graph.reach.forEach((reach) => offsets.push(offsets.at(-1) + reach));
    const columns = packed.columns ?? Array.from({ length: offsets.at(-1) }, (_, column) => column);
    const n = columns.length;
    const all = new Float32Array(decode(packed.strength).buffer);
    const bits = decode(packed.undefined);
    return {
      n,
      columns,
      offsets,
      place: new Map(columns.map((column, edge) => [column, edge])),
      strength: packed.names.map((_, k) => all.subarray(k * n, (k + 1) * n)),
      undefined: (k, edge) => (bits[((k - 1) * n + edge) >> 3] >> (((k - 1) * n + edge) & 7)) & 1,
    };
  }

  // A view is one number of every edge: of a model, or of a model against the baseline.
  function views(experiment) {
    const baseline = experiment.names[0];
    const list = experiment.names.map((name, k) => ({ kind: "strength", k, label: `mean |W| of ${name}` }));
    experiment.names.slice(1).forEach((name, i) => {
      const change = `${baseline} → ${name}`;
      list.push({ kind: "relative", k: i + 1, label: `relative change, ${change}` });
      list.push({ kind: "difference", k: i + 1, label: `difference, ${change}` });
    });
    return list;
  }

  /** The value of an edge, NaN where it is no finding. */
  function value(edges, view, edge) {
    const after = edges.strength[view.k][edge];
    if (view.kind === "strength") return after;
    const before = edges.strength[0][edge];
    if (view.kind === "difference") return after - before;
    return edges.undefined(view.k, edge) ? NaN : (after - before) / before;
  }

  function show(view, number) {
    if (Number.isNaN(number)) return "undefined";
    if (view.kind === "strength") return number.toExponential(3);
    const sign = number >= 0 ? "+" : "";
    if (view.kind === "difference") return sign + number.toExponential(3);
    return `${sign}${Number((100 * number).toPrecision(4))}%`;
  }

  // Colours: stops of viridis and of a diverging scale, blue to red.
  const STRENGTH = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
  const CHANGE = ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"];

  function colour(stops, share) {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mix = [0, 2, 4].map((i) => {
      const [a, b] = [stops[low], stops[low + 1]].map((stop) => parseInt(stop.slice(i, i + 2), 16));
      return Math.round(a + (at - low) * (b - a));
    });
    return `rgb(${mix})`;
  }

  const percentile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

  /** Ends of the colours over all edges of an experiment, so that filters do not shift them. */
  function scaleOf(edges, view) {
    const everyEdge = Array.from({ length: edges.n }, (_, edge) => edge);
    if (view.kind === "strength") {
      const positive = edges.strength.flatMap((row) => Array.from(row).filter((x) => x > 0)).sort((a, b) => a - b);
      const top = positive.at(-1) ?? 1;
      const bottom = Math.min(Math.max(percentile(positive, 0.01) ?? top, top * 1e-4), top / 10);
      const share = (x) => Math.log(Math.max(x, bottom) / bottom) / Math.log(top / bottom);
      return { low: bottom, high: top, stops: STRENGTH, share };
    }
    const sizes = everyEdge.map((edge) => Math.abs(value(edges, view, edge))).filter((x) => x >= 0);
    const limit = percentile(sizes.sort((a, b) => a - b), 0.95) || 1;
    return { low: -limit, high: limit, stops: CHANGE, share: (x) => 0.5 + x / limit / 2 };
  }

  // State: what is chosen, and which sources and destinations pass the filters.
  const state = { experiment: null, view: null, rows: [], columns: [], width: 0, height: 0, row: 0, column: 0 };

  function option(select, text, key) {
    const made = document.createElement("option");
    made.textContent = text;
    made.value = key;
    select.append(made);
    return made;
  }

  function fillExperiments() {
    const groups = new Map();
    experiments.forEach((experiment, i) => {
      if (!groups.has(experiment.family)) {
        const group = document.createElement("optgroup");
        group.label = experiment.family;
        $("experiment").append(group);
        groups.set(experiment.family, group);
      }
      groups.get(experiment.family).append(option($("experiment"), experiment.label, i));
    });
  }

  function fillViews() {
    const before = state.view;
    const list = views(state.experiment);
    $("view").replaceChildren();
    list.forEach((view, i) => option($("view"), view.label, i));
    const last = state.experiment.names.length - 1;
    const same = list.findIndex((view) => before && view.kind === before.kind && view.k === Math.min(before.k, last));
    $("view").value = same >= 0 ? same : list.findIndex((view) => view.kind === "relative" && view.k === last);
  }

  const KINDS = ["input", "attention", "q", "k", "v", "mlp", "logits"];

  function fillFilter(id, nodes) {
    const box = $(id);
    box.querySelectorAll("label").forEach((label) => label.remove());
    KINDS.filter((kind) => nodes.some((node) => node.kind === kind)).forEach((kind) => {
      const label = document.createElement("label");
      const check = document.createElement("input");
      Object.assign(check, { type: "checkbox", checked: true, value: kind });
      label.append(check, ` ${kind}`);
      box.append(label);
    });
    const layers = [...new Set(nodes.filter(inLayer).map((node) => node.layer))];
    for (const [role, chosen] of [["from", layers[0]], ["to", layers.at(-1)]]) {
      const label = document.createElement("label");
      const select = document.createElement("select");
      select.dataset.role = role;
      layers.forEach((layer) => option(select, layer, layer));
      select.value = chosen;
      label.append(role === "from" ? "layers " : "to ", select);
      box.append(label);
    }
  }

  const inLayer = (node) => node.kind !== "input" && node.kind !== "logits";

  function passing(id, nodes) {
    const box = $(id);
    const kinds = new Set(Array.from(box.querySelectorAll("input:checked"), (check) => check.value));
    const [from, to] = ["from", "to"].map((role) => Number(box.querySelector(`[data-role=${role}]`).value));
    return nodes
      .map((_, i) => i)
      .filter((i) => kinds.has(nodes[i].kind) && (!inLayer(nodes[i]) || (nodes[i].layer >= from && nodes[i].layer <= to)));
  }

  /** The edge at a source and a destination: -1 for none, -2 for one that was not measured. */
  function edgeAt(source, destination) {
    const { graph, edges } = state.experiment;
    if (source >= graph.reach[destination]) return -1;
    return edges.place.get(edges.offsets[destination] + source) ?? -2;
  }

  function* visibleEdges() {
    for (const destination of state.columns)
      for (const source of state.rows) {
        const edge = edgeAt(source, destination);
        if (edge >= 0) yield { source, destination, edge };
      }
  }

  // Drawing.
  function prepare(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = getComputedStyle(document.body).color;
    context.font = "10px sans-serif";
    context.textBaseline = "middle";
    return context;
  }

  /** What stands beside rows or columns: every name where there is room, else layers. */
  function labels(nodes, shown, size) {
    const inside = (at) => Math.min(Math.max(at, 6), shown.length * size - 6);
    if (size >= 11) return shown.map((i, at) => ({ at: (at + 0.5) * size, text: nodes[i].name }));
    const groups = [];
    shown.forEach((i, at) => {
      const name = inLayer(nodes[i]) ? String(nodes[i].layer) : nodes[i].name;
      if (groups.at(-1)?.text !== name) groups.push({ text: name, first: at });
      groups.at(-1).last = at;
    });
    let free = -Infinity;
    return groups
      .map(({ text, first, last }) => ({ text, at: inside(((first + last + 1) / 2) * size) }))
      .filter(({ at }) => at - free >= 11 && ((free = at), true));
  }

  function draw() {
    const { experiment, view, rows, columns } = state;
    const { graph, edges } = experiment;
    const names = [graph.sources, graph.destinations].map((nodes) => Math.max(...nodes.map((node) => node.name.length)));
    const margin = 6.2 * names[0] + 12;
    const room = document.querySelector(".plot").clientWidth - margin - 12;
    const width = (state.width = Math.max(2, Math.min(36, Math.floor(room / Math.max(1, columns.length)))));
    const height = (state.height = Math.max(3, Math.min(26, Math.floor(430 / Math.max(1, rows.length)))));

    const scale = scaleOf(edges, view);
    const context = prepare(cells, width * columns.length, height * rows.length);
    const undefinedColour = getComputedStyle(cells).color;
    const gap = Math.min(width, height) >= 8 ? 1 : 0;
    columns.forEach((destination, x) =>
      rows.forEach((source, y) => {
        const edge = edgeAt(source, destination);
        if (edge < 0) return;
        const number = value(edges, view, edge);
        context.fillStyle = Number.isNaN(number) ? undefinedColour : colour(scale.stops, scale.share(number));
        context.fillRect(x * width, y * height, width - gap, height - gap);
      }),
    );

    const left = prepare($("row-names"), margin, height * rows.length);
    left.textAlign = "right";
    labels(graph.sources, rows, height).forEach(({ text, at }) => left.fillText(text, margin - 6, at));
    const below = prepare($("column-names"), width * columns.length, 6.2 * names[1] + 12);
    labels(graph.destinations, columns, width).forEach(({ text, at }) => {
      below.save();
      below.translate(at, 6);
      below.rotate(-Math.PI / 2);
      below.textAlign = "right";
      below.fillText(text, 0, 0);
      below.restore();
    });

    const bar = $("scale").getContext("2d");
    for (let x = 0; x < 256; x++) {
      bar.fillStyle = colour(scale.stops, x / 255);
      bar.fillRect(x, 0, 1, 1);
    }
    $("scale-low").textContent = show(view, scale.low);
    $("scale-high").textContent = show(view, scale.high);
    $("scale-name").textContent =
      view.kind === "strength" ? "mean |W|, logarithmic" : "colours end at the 95th percentile of the sizes";
  }

  // Words.
  function describe(source, destination) {
    const { graph, edges, names } = state.experiment;
    const name = `${graph.sources[source].name}→${graph.destinations[destination].name}`;
    const edge = edgeAt(source, destination);
    if (edge === -1) return `${name}: no edge`;
    if (edge === -2) return `${name}: not measured`;
    const lines = [`${name}: ${show(state.view, value(edges, state.view, edge))}`];
    names.forEach((model, k) => lines.push(`mean |W| of ${model}: ${edges.strength[k][edge].toExponential(3)}`));
    return lines.join("\n");
  }

  function listStrongest() {
    const { graph, edges } = state.experiment;
    const wanted = Math.min(500, Math.max(1, Math.floor(Number($("top").value)) || 1));
    const found = [...visibleEdges()]
      .map((at) => ({ ...at, number: value(edges, state.view, at.edge) }))
      .filter(({ number }) => !Number.isNaN(number))
      .sort((a, b) => Math.abs(b.number) - Math.abs(a.number) || a.edge - b.edge)
      .slice(0, wanted);
    $("strongest").replaceChildren(
      ...found.map(({ source, destination, number }) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        const [name, amount] = [document.createElement("span"), document.createElement("span")];
        name.textContent = `${graph.sources[source].name}→${graph.destinations[destination].name}`;
        amount.textContent = show(state.view, number);
        button.type = "button";
        button.append(name, amount);
        button.addEventListener("click", () => {
          moveTo(state.rows.indexOf(source), state.columns.indexOf(destination));
          cells.focus();
        });
        item.append(button);
        return item;
      }),
    );
  }

  function moveTo(row, column) {
    const empty = !state.rows.length || !state.columns.length;
    $("cursor").hidden = empty;
    if (empty) {
      $("cell").textContent = "No source or no destination passes the filters.";
      return;
    }
    state.row = Math.min(Math.max(row, 0), state.rows.length - 1);
    state.column = Math.min(Math.max(column, 0), state.columns.length - 1);
    Object.assign($("cursor").style, {
      left: `${state.column * state.width}px`,
      top: `${state.row * state.height}px`,
      width: `${state.width}px`,
      height: `${state.height}px`,
    });
    $("cell").textContent = describe(state.rows[state.row], state.columns[state.column]);
  }

  // A CSV of what passes the filters, every number to the last bit of its float32.
  function csv() {
    const { graph, edges, names } = state.experiment;
    const quote = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const later = names.slice(1).map((name, i) => ({ name, k: i + 1 }));
    const head = ["column", "source", "destination", "source_layer", "destination_layer"];
    names.forEach((name) => head.push(`strength ${name}`));
    later.forEach(({ name }) => head.push(`difference ${name}`, `relative change ${name}`));
    const lines = [...visibleEdges()].map(({ source, destination, edge }) => {
      const [from, to] = [graph.sources[source], graph.destinations[destination]];
      const line = [edges.columns[edge], from.name, to.name, from.layer, to.layer];
      names.forEach((_, k) => line.push(edges.strength[k][edge]));
      later.forEach(({ k }) => {
        const change = value(edges, { kind: "relative", k }, edge);
        line.push(value(edges, { kind: "difference", k }, edge), Number.isNaN(change) ? "" : change);
      });
      return line;
    });
    return [head, ...lines].map((line) => line.map((each) => quote(String(each))).join(",")).join("\n") + "\n";
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = `edges ${state.experiment.label}`.replace(/[^0-9A-Za-z.]+/g, "-") + ".csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // What follows from a choice.
  function refresh() {
    const { graph } = state.experiment;
    state.view = views(state.experiment)[$("view").value];
    const [row, column] = [state.rows[state.row], state.columns[state.column]];
    state.rows = passing("source-filter", graph.sources);
    state.columns = passing("destination-filter", graph.destinations);
    draw();
    listStrongest();
    // The cursor stays on its edge while that is shown.
    moveTo(Math.max(0, state.rows.indexOf(row)), Math.max(0, state.columns.indexOf(column)));
  }

  function clearFilters() {
    fillFilter("source-filter", state.experiment.graph.sources);
    fillFilter("destination-filter", state.experiment.graph.destinations);
    refresh();
  }

  function choose() {
    const before = state.experiment;
    state.experiment = experiments[$("experiment").value];
    fillViews();
    if (before?.graph === state.experiment.graph) refresh();
    else clearFilters();
  }

  function under(event) {
    const box = cells.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / state.height);
    const column = Math.floor((event.clientX - box.left) / state.width);
    return row >= 0 && row < state.rows.length && column >= 0 && column < state.columns.length ? [row, column] : null;
  }

  cells.addEventListener("mousemove", (event) => {
    const at = under(event);
    $("tip").hidden = !at;
    if (!at) return;
    $("tip").textContent = describe(state.rows[at[0]], state.columns[at[1]]);
    const { offsetWidth: wide, offsetHeight: tall } = $("tip");
    $("tip").style.left = `${Math.min(event.clientX + 14, innerWidth - wide - 8)}px`;
    $("tip").style.top = `${Math.min(event.clientY + 14, innerHeight - tall - 8)}px`;
  });
  cells.addEventListener("mouseleave", () => ($("tip").hidden = true));
  cells.addEventListener("click", (event) => {
    const at = under(event);
    if (at) moveTo(...at);
  });
  const MOVES = {
    ArrowUp: () => [state.row - 1, state.column],
    ArrowDown: () => [state.row + 1, state.column],
    ArrowLeft: () => [state.row, state.column - 1],
    ArrowRight: () => [state.row, state.column + 1],
    Home: () => [state.row, 0],
    End: () => [state.row, Infinity],
    PageUp: () => [0, state.column],
    PageDown: () => [Infinity, state.column],
  };
  cells.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    moveTo(...MOVES[event.key]());
  });
  $("experiment").addEventListener("change", choose);
  $("view").addEventListener("change", refresh);
  $("source-filter").addEventListener("change", refresh);
  $("destination-filter").addEventListener("change", refresh);
  $("reset").addEventListener("click", clearFilters);
  $("csv").addEventListener("click", download);
  $("top").addEventListener("input", listStrongest);
  addEventListener("resize", () => {
    draw();
    moveTo(state.row, state.column);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  $("explorer").hidden = false;
  fillExperiments();
  choose();
})();
