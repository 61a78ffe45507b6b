// Runs once when the page has loaded. Gradio's preview of a chosen clip calls a file that the browser cannot play an
// error; here it is none, since such a clip is read all the same. So that error does not reach Gradio, and a word stands
// in the empty preview instead. Nor is it one that the server does not give out what cuts clips in the page.
() => {
  const preview = (event) => event.target instanceof HTMLVideoElement && event.target.closest(".clip-input");
  window.addEventListener(
    "error",
    (event) => {
      const area = preview(event);
      if (!area) return;
      event.stopImmediatePropagation();
      area.classList.add("without-preview");
    },
    true,
  );
  window.addEventListener("unhandledrejection", (event) => {
    if (String(event.reason?.message || event.reason).includes("ffmpeg-core")) event.preventDefault();
  });
  window.addEventListener("loadstart", (event) => preview(event)?.classList.remove("without-preview"), true);
};
