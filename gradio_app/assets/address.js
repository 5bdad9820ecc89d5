(ids) => {
  const url = new URL(window.location.href);
  if (ids && ids.length) url.searchParams.set('runs', ids.join(','));
  else url.searchParams.delete('runs');
  url.search = url.search.replaceAll('%2C', ',');
  window.history.replaceState(window.history.state, '', url);
}
