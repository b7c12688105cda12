for (const film of document.querySelectorAll(".film")) {
  const steps = film.querySelectorAll(".step");
  const slider = film.querySelector("input");
  const told = film.querySelector("output");
  const button = film.querySelector("button");
  const last = steps.length - 1;
  let playing = 0;
  const show = () => {
    const step = Number(slider.value);
    steps.forEach((group, place) => group.classList.toggle("shown", place === step));
    told.value = step ? `refinement ${step} of ${last}` : "initialisation";
  };
  const stop = () => {
    clearInterval(playing);
    playing = 0;
    button.textContent = "play";
  };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (playing) return stop();
    if (Number(slider.value) === last) slider.value = 0;
    show();
    button.textContent = "stop";
    playing = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === last) stop();
    }, 280);
  });
  film.querySelector(".controls").hidden = false;
  show();
}
