// Draw the figures of the page with plotly.js, each when it comes near the screen. Until then, on paper and without
// JavaScript the drawing that stands in the page is shown.
"use strict";
(() => {
  const NARROW = 640, PANEL = 300, colours = JSON.parse(document.getElementById("colours").textContent);
  const drawn = new Map();

  // plotly.js stands in the page compressed, and is unpacked when the first figure comes near the screen.
  let unpacked = null;
  async function unpack() {
    const held = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([held]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  // The figure with the colours of the page, which change between light and dark.
  function described(figure) {
    let text = figure.querySelector("script").textContent;
    const style = getComputedStyle(document.documentElement);
    for (const [colour, name] of Object.entries(colours)) {
      text = text.replaceAll(colour, style.getPropertyValue(name).trim());
    }
    const plot = JSON.parse(text);
    plot.layout.font.family = getComputedStyle(document.body).fontFamily;
    return plot;
  }

  // On a narrow screen, panels stand below each other.
  function arranged(plot, width) {
    const layout = plot.layout;
    const count = layout.meta.panels, isStacked = width < NARROW && count > 1;
    layout.height = isStacked ? PANEL * count + 60 : count > 1 ? 400 : width < NARROW ? 400 : 480;
    if (width < NARROW) {
      Object.assign(layout.margin, { l: 48, r: 12 });
      plot.data.filter((trace) => trace.colorbar).forEach((trace) => {
        Object.assign(trace.colorbar, { orientation: "h", x: 0, xanchor: "left", y: -0.25, yanchor: "top" });
        Object.assign(trace.colorbar, { tickangle: 0, tickfont: { size: 10 } });
        Object.assign(trace.colorbar.title, { side: "top", font: { size: 12 } });
        layout.height += 60;
      });
    }
    for (let i = 0; i < count && isStacked; i++) {
      const suffix = i ? String(i + 1) : "", gap = 0.3 / count, height = (1 - gap * (count - 1)) / count;
      const top = 1 - i * (height + gap);
      layout["xaxis" + suffix].domain = [0, 1];
      layout["yaxis" + suffix].domain = [Math.max(0, top - height), top];
    }
  }

  // The legend takes as many rows as its entries need at this width: the plot starts below the last of them.
  async function makeRoom(live, plot) {
    const legend = live.querySelector(".legend .bg");
    const more = legend ? legend.getBBox().height + (plot.layout.meta.titled ? 24 : 0) + 6 - plot.layout.margin.t : 0;
    if (more > 0) {
      await Plotly.relayout(live, { "margin.t": plot.layout.margin.t + more, height: plot.layout.height + more });
    }
  }

  // Marks at fixed places are too few after a zoom: plotly then chooses its own.
  function marksAfterZoom(live, plot) {
    live.on("plotly_relayout", (change) => {
      const update = {};
      for (const key of Object.keys(change)) {
        const axis = key.split(".")[0];
        if (!plot.layout[axis] || !plot.layout[axis].tickvals) continue;
        if (key.endsWith("range[0]")) update[axis + ".tickmode"] = "auto";
        if (key.endsWith("autorange")) update[axis + ".tickmode"] = "array";
      }
      if (Object.keys(update).length) Plotly.relayout(live, update);
    });
  }

  async function draw(figure) {
    await (unpacked ??= unpack());
    const live = figure.querySelector(".live"), plot = described(figure), isFirst = !drawn.has(figure);
    figure.classList.add("drawn");
    drawn.set(figure, live.clientWidth);
    arranged(plot, live.clientWidth);
    await Plotly.react(live, plot.data, plot.layout, plot.config);
    await makeRoom(live, plot);
    if (isFirst) marksAfterZoom(live, plot);
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target).catch(() => entry.target.classList.remove("drawn"));
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll("figure.chart").forEach((figure) => near.observe(figure));

  const redraw = () => drawn.forEach((_, figure) => draw(figure));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", () => {
    drawn.forEach((width, figure) => {
      const now = figure.querySelector(".live").clientWidth;
      if (now && (now < NARROW) !== (width < NARROW)) draw(figure);
    });
  });
})();
