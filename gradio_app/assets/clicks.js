// Buttons in HTML of the page. What they are about is in their data attributes, and is checked like
// all that arrives. A question that was opened stays open when the HTML around it is sent again.
// None is called data-path: Gradio takes what comes under that name for a file, and refuses it.
let asked = null;
const show = () => {
  for (const box of element.querySelectorAll('[data-question]')) {
    box.hidden = box.dataset.question !== asked;
  }
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button, input[data-act]');
  if (!button || button.disabled) return;
  const { act, opens, closes, ...about } = button.dataset;
  if (opens !== undefined || closes !== undefined || act) asked = opens ?? null;
  show();
  if (opens !== undefined) {
    const box = [...element.querySelectorAll('[data-question]')].find((one) => !one.hidden);
    box?.querySelector('button')?.focus();
  }
  if (act) trigger('click', { act, ...about });
});
watch('value', () => setTimeout(show));
