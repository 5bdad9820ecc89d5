() => {
  const steps = ['start', 'model', 'data', 'method', 'review', 'all'];
  const page = document.getElementById('page');
  const show = (focus) => {
    const asked = window.location.hash.slice(1);
    if (asked && !steps.includes(asked)) return;
    const step = asked || 'start';
    page.dataset.step = step;
    document.querySelectorAll('nav.steps a').forEach((link) => {
      if (link.hash.slice(1) === step) link.setAttribute('aria-current', 'step');
      else link.removeAttribute('aria-current');
    });
    if (!focus) return;
    const heading = document.getElementById(`heading-${step === 'all' || step === 'start' ? 'model' : step}`);
    heading?.focus({ preventScroll: true });
    document.querySelector('nav.steps')?.scrollIntoView({ block: 'start' });
  };
  // What is clicked before the draft is there would be taken back by it.
  const steps_of_page = [...document.querySelectorAll('.step')];
  const restored = () => document.querySelector('#model-facts .chosen');
  if (!restored()) {
    for (const step of steps_of_page) step.inert = true;
    const free = () => { for (const step of steps_of_page) step.inert = false; };
    const watch = new MutationObserver(() => {
      if (!restored()) return;
      watch.disconnect();
      free();
    });
    watch.observe(page, { childList: true, subtree: true });
    setTimeout(free, 30_000);
  }
  window.addEventListener('hashchange', () => show(true));
  show(false);
}
