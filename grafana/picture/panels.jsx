// Draws panels of a dashboard with the components that Grafana itself draws them with: stat, time series, bar gauge.
// State timelines, heatmaps and tables are not part of these packages: they are left out, and the page says so.
//
// window.draw({title, panels, from, to, caption}): a panel is the dashboard's JSON with `answers`, one list of
// Prometheus range results for each target.

import React from 'react';
import { flushSync } from 'react-dom';
import { createRoot } from 'react-dom/client';
import { FieldType, createTheme, dateTime, getDisplayProcessor, ThemeContext, toDataFrame } from '@grafana/data';
import { BarGauge, BigValue, TimeSeries } from '@grafana/ui';
import plotStyle from 'uplot/dist/uPlot.min.css';

const UNIT = 30; // pixels of a grid row, as in Grafana
const GAP = 8;
const theme = createTheme({ colors: { mode: 'light' } });

function legend(template, labels) {
  return (template || '').replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '');
}

// Overrides are applied here by series name alone: the dashboards have no others.
function configOf(panel, name) {
  const { defaults, overrides = [] } = panel.fieldConfig;
  const config = { ...defaults, custom: { ...defaults.custom }, displayName: name, links: [] };
  for (const { matcher, properties } of overrides) {
    if (matcher.id !== 'byRegexp' || !new RegExp(matcher.options.slice(1, -1)).test(name)) continue;
    for (const { id, value } of properties) {
      if (id.startsWith('custom.')) config.custom[id.slice(7)] = value;
      else if (id !== 'links') config[id] = value;
    }
  }
  return config;
}

function framesOf(panel) {
  const frames = [];
  panel.targets.forEach((target, index) => {
    for (const { metric, values } of panel.answers[index]) {
      const name = legend(target.legendFormat, metric) || 'Value';
      const frame = toDataFrame({
        refId: target.refId,
        fields: [
          { name: 'Time', type: FieldType.time, values: values.map(([at]) => at * 1000) },
          { name, type: FieldType.number, labels: metric, values: values.map(([, value]) => Number(value)), config: configOf(panel, name) },
        ],
      });
      for (const [number, field] of frame.fields.entries()) {
        field.state = { displayName: number ? name : 'Time', seriesIndex: frames.length };
        field.display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
      }
      frames.push(frame);
    }
  });
  return frames;
}

function last(frame) {
  const { values, display } = frame.fields[1];
  return { ...display(values[values.length - 1]), title: frame.fields[1].state.displayName };
}

// Bars begin and end under each other: there is room for the longest name and number.
function widest(frames) {
  const longest = (texts) => texts.reduce((one, two) => (two.length > one.length ? two : one), '');
  const values = frames.map(last);
  return { title: longest(values.map((each) => each.title)), text: longest(values.map((each) => each.text)), suffix: '%' };
}

function Body({ panel, width, height, from, to }) {
  const frames = framesOf(panel);
  if (frames.length === 0) return <p style={{ color: theme.colors.text.secondary }}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</p>;
  if (panel.type === 'timeseries') {
    const range = { from: dateTime(from * 1000), to: dateTime(to * 1000) };
    return (
      <TimeSeries frames={frames} width={width} height={height} timeRange={{ ...range, raw: range }} timeZone="utc"
        legend={{ ...panel.options.legend, calcs: [] }} options={panel.options} />
    );
  }
  const each = Math.floor(panel.type === 'bargauge' ? height / frames.length : width / frames.length);
  const options = panel.options;
  return (
    <div style={{ display: 'flex', flexDirection: panel.type === 'bargauge' ? 'column' : 'row' }}>
      {frames.map((frame, index) =>
        panel.type === 'bargauge' ? (
          <BarGauge key={index} value={last(frame)} field={frame.fields[1].config} display={frame.fields[1].display} width={width}
            height={Math.min(each, 60)} theme={theme} orientation="horizontal" displayMode={options.displayMode} valueDisplayMode={options.valueMode}
            showUnfilled={options.showUnfilled} text={{ titleSize: 14, valueSize: 16 }} alignmentFactors={widest(frames)} />
        ) : (
          <BigValue key={index} value={last(frame)} width={each} height={height} theme={theme} colorMode={options.colorMode}
            graphMode="none" justifyMode={options.justifyMode} textMode={options.textMode} />
        )
      )}
    </div>
  );
}

function Page({ title, panels, from, to, caption, width }) {
  const column = (width - 2 * GAP) / 24;
  const drawn = panels.filter((panel) => ['stat', 'timeseries', 'bargauge'].includes(panel.type));
  return (
    <main style={{ width, background: theme.colors.background.canvas, color: theme.colors.text.primary, fontFamily: theme.typography.fontFamily, padding: GAP, boxSizing: 'border-box' }}>
      <h1 style={{ fontSize: 20, fontWeight: 500, margin: '4px 4px 12px' }}>{title}</h1>
      <div style={{ display: 'flex', flexWrap: 'wrap' }}>
        {drawn.map((panel) => {
          const box = { width: panel.gridPos.w * column, height: panel.gridPos.h * (UNIT + GAP) };
          return (
            <section key={panel.id} style={{ ...box, padding: GAP / 2, boxSizing: 'border-box' }}>
              <div style={{ height: '100%', background: theme.colors.background.primary, border: `1px solid ${theme.colors.border.weak}`, borderRadius: 2, padding: GAP, boxSizing: 'border-box', overflow: 'hidden' }}>
                <h2 style={{ fontSize: 14, fontWeight: 500, margin: '0 0 6px' }}>{panel.title}</h2>
                <Body panel={panel} from={from} to={to} width={box.width - 3.5 * GAP} height={box.height - 7 * GAP} />
              </div>
            </section>
          );
        })}
      </div>
      <p style={{ fontSize: 12, color: theme.colors.text.secondary, margin: '8px 4px' }}>{caption}</p>
    </main>
  );
}

window.draw = (what) => {
  document.body.style.margin = '0';
  document.head.append(Object.assign(document.createElement('style'), { textContent: plotStyle }));
  const root = createRoot(document.getElementById('page'));
  flushSync(() => root.render(<ThemeContext.Provider value={theme}><Page {...what} /></ThemeContext.Provider>));
};
