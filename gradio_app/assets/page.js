// What a page does in the browser besides Gradio: its title, its language, light or dark.
(() => {
  const path = () => window.location.pathname.replace(/\/+$/, "").split("/").pop();
  const setTitle = () => {
    const title = window.studioTitles[path()] ?? window.studioTitles[""];
    const news = document.querySelector("[data-title]")?.dataset.title;
    const wanted = news ? `${news} - ${title}` : title;
    if (document.title !== wanted) document.title = wanted;
  };
  const setLanguage = () => {
    const current = document.querySelector(".languages [aria-current]");
    if (current && document.documentElement.lang !== current.lang) {
      document.documentElement.lang = current.lang;
    }
  };
  // Several notices share a header that Gradio makes a button with a button in it, which nobody can
  // use who cannot see it. It only folds them up, so it need be none.
  const flattenNotices = () => {
    for (const head of document.querySelectorAll('.toast-header[role="button"]')) {
      head.removeAttribute("role");
      head.removeAttribute("tabindex");
    }
  };
  // What Gradio says to screen readers in English alone.
  const setLabels = () => {
    const known = window.studioLabels[document.documentElement.lang] ?? {};
    for (const [english, own] of Object.entries(known)) {
      for (const one of document.querySelectorAll(`[aria-label="${english}"]`)) {
        one.setAttribute("aria-label", own);
      }
    }
  };
  // A machine that has slept has lost its connections, and the server may have forgotten the page.
  const ASLEEP = 5 * 60_000;
  let awake = Date.now();
  setInterval(() => {
    const before = awake;
    awake = Date.now();
    // What somebody is typing would be lost.
    const typing = document.activeElement?.matches("input, textarea");
    if (awake - before > ASLEEP && !typing) window.location.reload();
  }, 20_000);
  const showHelp = () => {
    const page = document.getElementById("page"), button = document.getElementById("explain");
    if (!page || !button) return;
    const on = localStorage.getItem("studio-help") === "on";
    if (on !== ("help" in page.dataset)) page.toggleAttribute("data-help", on);
    if (button.ariaPressed !== String(on)) button.ariaPressed = String(on);
  };
  const theme = localStorage.getItem("studio-theme");
  const setTheme = (name) => document.body.classList.toggle("dark", name === "dark");
  document.addEventListener("click", (event) => {
    // Gradio's base address would turn a link within the page into one to the first page.
    const jump = event.target.closest('a[href^="#"]');
    if (jump) {
      event.preventDefault();
      window.location.hash = jump.getAttribute("href");
    }
    const link = event.target.closest("[data-keeps-query]");
    if (link) link.search = window.location.search;
    if (event.target.closest("#light-or-dark")) {
      const name = document.body.classList.contains("dark") ? "light" : "dark";
      localStorage.setItem("studio-theme", name);
      setTheme(name);
    }
    if (event.target.closest("#explain")) {
      const on = localStorage.getItem("studio-help") === "on";
      localStorage.setItem("studio-help", on ? "off" : "on");
      showHelp();
    }
    const copied = event.target.closest("[data-copies]");
    if (copied) navigator.clipboard?.writeText(copied.dataset.copies);
    const plot = event.target.closest(".plot");
    if (event.target.closest("[data-plot-full]")) plot.requestFullscreen?.();
    if (event.target.closest("[data-plot-save]")) save(plot.querySelector("svg.marks"));
  });
  // A plot as a file: its text and grid fall back on colours for white ground.
  const save = (svg) => {
    const { width, height } = svg.getBoundingClientRect();
    const inner = svg.cloneNode(true);
    for (const [name, value] of Object.entries({ x: 70, y: 20, width, height })) {
      inner.setAttribute(name, value);
    }
    const text = `<svg xmlns="http://www.w3.org/2000/svg" width="${width + 90}" ` +
      `height="${height + 60}" font-family="sans-serif">` +
      `<rect width="100%" height="100%" fill="white"/>${inner.outerHTML}</svg>`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    link.download = "plot.svg";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  // What a plot has where the pointer is.
  document.addEventListener("pointermove", (event) => {
    const area = event.target.closest?.(".plot-area");
    for (const shown of document.querySelectorAll(".plot-said")) {
      if (shown.parentElement !== area) shown.style.display = "none";
    }
    if (!area) return;
    const { left, width } = area.getBoundingClientRect();
    const at = (event.clientX - left) / width;
    const points = JSON.parse(area.dataset.points);
    const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const said = area.querySelector(".plot-said");
    said.textContent = near[1];
    said.style.display = "block";
    const place = near[0] * width;
    const begin = Math.max(0, Math.min(place + 8, width - said.offsetWidth));
    said.style.left = `${begin}px`;
    said.style.setProperty("--at", `${place - begin}px`);
  });
  const watch = () => {
    if (theme && !new URLSearchParams(window.location.search).has("__theme")) setTheme(theme);
    new MutationObserver(() => { setTitle(); setLanguage(); setLabels(); flattenNotices(); showHelp(); })
      .observe(document.documentElement, { childList: true, subtree: true });
    setTitle();
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", watch);
  else watch();
})();
