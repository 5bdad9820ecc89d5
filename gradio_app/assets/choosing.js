
// The fields to edit a run appear above the table: the first of them gets the focus.
const focusFields = (tries) => {
  const first = document.querySelector('#edit-name :is(input, textarea)');
  if (first?.checkVisibility()) first.focus();
  else if (tries) setTimeout(() => focusFields(tries - 1), 100);
};
// What had the focus has it again when the table is sent again.
let held = null;
const nameOf = (one) => JSON.stringify({ ...one.dataset });
element.addEventListener('focusin', (event) => { held = nameOf(event.target); });
element.addEventListener('focusout', (event) => { if (event.relatedTarget) held = null; });
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-act=edit]')) focusFields(100);
});
watch('value', () => setTimeout(() => {
  if (!held || held === '{}' || document.activeElement !== document.body) return;
  const all = [...element.querySelectorAll('button, input')];
  all.find((one) => nameOf(one) === held)?.focus({ preventScroll: true });
}));
