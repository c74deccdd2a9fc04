// A request as a command of a POSIX shell.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** hasKey: the key is taken from the variable BEDPLATE_API_KEY, so that the command can be shown and shared. */
export function curl(address, body, hasKey) {
  const lines = [
    `curl -sSN ${quoted(address)}`,
    "-H 'Content-Type: application/json'",
    ...(hasKey ? ['-H "Authorization: Bearer $BEDPLATE_API_KEY"'] : []),
    `-d ${quoted(JSON.stringify(body))}`,
  ];
  return lines.join(" \\\n  ");
}
