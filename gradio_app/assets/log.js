const log = element.querySelector('[role=log]');
const show = () => {
  const box = document.querySelector('#log-follow input');
  if (log.textContent !== props.value) log.textContent = props.value;
  if (!box || box.checked) log.scrollTop = log.scrollHeight;
};
watch('value', show);
document.addEventListener('change', (event) => {
  if (event.target.closest('#log-follow')) show();
});
show();
