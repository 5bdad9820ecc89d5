(text) => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/jsonl' }));
  link.download = 'conversation.jsonl';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
